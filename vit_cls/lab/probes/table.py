"""The probes, by the word that is typed."""

from __future__ import annotations

from vit_cls.lab.probes.attentive import AttentiveProbe
from vit_cls.lab.probes.base import Probe
from vit_cls.lab.probes.dense import DenseProbe
from vit_cls.lab.probes.inversion import InvertProbe
from vit_cls.lab.probes.knn import KnnProbe
from vit_cls.lab.probes.layers import LayersProbe
from vit_cls.lab.probes.linear import LinearProbe
from vit_cls.lab.probes.retrieval import RetrievalProbe
from vit_cls.lab.probes.tokens import TokensProbe

PROBES: dict[str, type[Probe]] = {
    "linear": LinearProbe,
    "knn": KnnProbe,
    "retrieval": RetrievalProbe,
    "layers": LayersProbe,
    "tokens": TokensProbe,
    "attentive": AttentiveProbe,
    "dense": DenseProbe,
    "invert": InvertProbe,
}
