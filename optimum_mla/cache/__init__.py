"""The cache of converted models: latents in blocks, quantized or not, behind the Transformers cache contract."""

from optimum_mla.cache.backends import Backend, available_backends, register_backend
from optimum_mla.cache.cache import LatentCache
from optimum_mla.cache.layer import LatentLayer
from optimum_mla.cache.settings import CacheSettings

__all__ = ["Backend", "CacheSettings", "LatentCache", "LatentLayer", "available_backends", "register_backend"]
