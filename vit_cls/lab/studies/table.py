"""The studies, by the word that is typed."""

from __future__ import annotations

from vit_cls.lab.studies.any_token import AnyTokenStudy
from vit_cls.lab.studies.causal import CausalStudy
from vit_cls.lab.studies.depth import DepthStudy
from vit_cls.lab.studies.heads import HeadsStudy
from vit_cls.lab.studies.position import PositionStudy
from vit_cls.lab.studies.refine import RefineStudy
from vit_cls.lab.studies.specialise import SpecialiseStudy
from vit_cls.lab.studies.study import Study
from vit_cls.lab.studies.when import WhenStudy

STUDIES: dict[str, type[Study]] = {
    "heads": HeadsStudy,
    "any-token": AnyTokenStudy,
    "refine": RefineStudy,
    "depth": DepthStudy,
    "causal": CausalStudy,
    "position": PositionStudy,
    "when": WhenStudy,
    "specialise": SpecialiseStudy,
}
