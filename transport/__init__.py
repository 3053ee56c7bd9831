"""Transports: how block bytes travel. `base` holds the contract; one module per way."""

if __name__ != "kvshare.transport":  # a second import under the bare name would make second classes
    raise ImportError(f"import kvshare.transport, not {__name__}")
