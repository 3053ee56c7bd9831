"""kvshare on a Ray cluster: start, look, wait, stop. Ray places and restarts; blocks and lookups travel by sockets.

    import ray
    import kvshare.integrations.ray as kvshare_ray

    ray.init(address="auto")
    cluster = kvshare_ray.start(arena_bytes="64GiB")    # one node actor per Ray node, now and when one appears
    cluster.wait(timeout=60)
    print(cluster.status())
    ...                                                # engines in Ray actors and tasks find their node by themselves
    cluster.stop()

Any driver connected to the same Ray cluster may call `status`, `stop`, or `start` again, which attaches.
"""

if __name__ != "kvshare.integrations.ray":
    raise ImportError(f"import kvshare.integrations.ray, not {__name__}")

from kvshare.integrations.ray.cluster import Cluster, drain, engine_env, purge, start, status, stop
from kvshare.integrations.ray.status import ClusterStatus, NodeState, ShardState

__all__ = ["Cluster", "ClusterStatus", "NodeState", "ShardState", "drain", "engine_env", "purge", "start", "status", "stop"]
