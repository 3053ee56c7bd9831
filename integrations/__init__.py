"""Integrations: vLLM, Ray, and the Python API for custom stacks. Nothing in kvshare imports these."""

if __name__ != "kvshare.integrations":
    raise ImportError(f"import kvshare.integrations, not {__name__}")
