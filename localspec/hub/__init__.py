"""Models from the Hub: fetched, checked and found again; which pairs are known, what fits this machine.

    name       org/name@revision:choice, taken apart        choice    which files of a repository
    client     the Hub's answers; errors at the border      transfer  one file, resumable and verified
    cache      the Hub cache on disk                        trust     what is never fetched
    pull       all of it together                           resolver  a name or path -> a model on this machine
    catalog    known pairs, and users' own                  selection what runs and fits here
    fit        the memory that a pair takes                 convert   safetensors to GGUF or fewer bits
    headers    of models that are not here

Importing this package imports nothing.
"""
