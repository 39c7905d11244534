"""A local server for programs that speak to OpenAI's or Anthropic's interfaces: many requests, one model.

    app -> routes -> dialects -> desk -> batch -> engine

`batch` knows no HTTP: it verifies the trees of all requests in one pass. `dialects` are the interfaces, one file each;
everything between them and the batch is the same for all. `docs/server.md` shows how to point tools at it.
"""
