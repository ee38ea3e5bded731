"""Scores of the reference model, which preference objectives compare the policy with: computed or looked up."""

from lightning_mlc.reference.fingerprint import describe_model
from lightning_mlc.reference.online import OnlineReference
from lightning_mlc.reference.precomputed import PrecomputedReference, precompute
from lightning_mlc.reference.settings import ReferenceSettings

__all__ = ["OnlineReference", "PrecomputedReference", "ReferenceSettings", "describe_model", "precompute"]
