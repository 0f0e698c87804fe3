"""The same run on several GPUs or machines, by Ray: parts whose models are on the workers of a cluster."""

from artaug._internal.extras import check_installed

check_installed("ray", required_by="artaug.scale", extra="scale")

from artaug.scale.cluster import RayCluster  # noqa: E402 - it imports ray
from artaug.scale.remote_parts import RemoteCritic, RemoteScorer, RemoteSynthesizer  # noqa: E402

__all__ = ["RayCluster", "RemoteCritic", "RemoteScorer", "RemoteSynthesizer"]
