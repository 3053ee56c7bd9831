"""The demo: a vLLM worker arrives warm, another dies mid-traffic, everything stops and comes back, and every output stays the
same. Run it with `make demo`.
"""

if __name__ != "kvshare.integrations.demo":
    raise ImportError(f"import kvshare.integrations.demo, not {__name__}")
