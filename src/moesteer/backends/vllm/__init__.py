"""Steering inside stock vLLM: a general plug-in, a mask per request, at the engine's own speed.

How it works, in the order things happen:

1. **Settings** (`settings.py`) are JSON in vLLM's own `additional_config["moesteer"]`, so that they reach every process
   and every node and are part of the key of vLLM's compile cache. Without them the plug-in changes nothing.
2. **Catalogue** (`catalogue.py`): every process reads the same mask files, by sha256, and works out the same *rows*:
   what a token can be steered by. A row is a set of masks (pinned, and at most one that a request names) with their
   bias and force tables added up. Row 0 is the model as it is. Nothing a client sends can make a row.
3. **Requests** (`requests.py`): where vLLM turns a request into tokens, its mask id becomes a row's name, and the row's
   digest goes into the salt of the prefix cache. An unknown id is refused there. A request that names none gets the
   pinned masks.
4. **Workers** (`worker.py`): once the model is loaded, every MoE layer of it is found and counted, its tables are put
   beside it (`tables.py`), and before each step every token's row is written into one persistent buffer. The operator
   `moesteer::steer` adds the row's bias to the router's logits: two kernels a layer on static storage, so that
   torch.compile and CUDA graphs stay on. A wrong count, another checkpoint or a feature that would go round the router
   (`refusals.py`) stops the start.
5. **Gates** (`gating.py`) are decided by a request of their own, unsteered, over the prompt: the operator sums the
   gate's scores, the front end reads them and names the row of the real request.
6. **Capture** reads the same logits from the same place (`capturing.py`).

`plugin.py` is the entry point and the list of everything of vLLM that is changed. `model.py` is the offline model of
`moesteer generate|evaluate|capture --backend vllm`; the server is `moesteer.serve`.
"""
