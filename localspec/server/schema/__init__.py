"""What clients may send, field by field. The only folder that knows pydantic.

Three kinds of fields: those that are honoured, those that mean nothing here and are *reported* back in the header
`X-Localspec-Ignored` (`Body.ignored`), and all others, which are refused. Nothing else happens to a field. Names follow
the interfaces of OpenAI and Anthropic; what llama.cpp, vLLM and mlx-lm add is taken under their names.

    reading -> chat, completions, responses, messages -> parts
"""
