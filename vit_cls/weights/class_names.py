"""Which classes the outputs of a published checkpoint stand for, and under which names they are known."""

from __future__ import annotations

import functools

from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.models import PretrainedCfg


def class_names_of(config: PretrainedCfg) -> list[str] | None:
    """The classes of a tag's head in order: WordNet ids, or the names that the record has.

    Args:
        config: timm's record.

    Returns:
        None where the outputs are no known classes (a text-aligned projection) or there is no head.
    """
    if config.label_names:
        names = list(config.label_names)
        return names if len(set(names)) == len(names) == config.num_classes else None
    subset = infer_imagenet_subset(config.to_dict())
    return None if subset is None else list(_imagenet(subset).label_names())


@functools.cache
def class_aliases(class_name: str) -> tuple[str, ...]:
    """Other names of an ImageNet class: its lemmas, with spaces and with underscores.

    Args:
        class_name: A WordNet id, ``n01440764``; anything else has no aliases.

    Example:
        >>> class_aliases("n01440764")
        ('tench', 'Tinca tinca', 'Tinca_tinca')
    """
    try:
        lemmas = _imagenet("imagenet-22k").label_name_to_description(class_name).split(", ")
    except KeyError:
        return ()
    return tuple(dict.fromkeys(form for lemma in lemmas for form in (lemma, lemma.replace(" ", "_"))))


@functools.cache
def _imagenet(subset: str) -> ImageNetInfo:
    return ImageNetInfo(subset)
