"""A variant in a module of its own, which Ray's workers import because Ray pickles its rule by reference."""

from hpo_plugin.variants import Variant, VariantSetting, register_variant


def tenth_alpha(counts, values):
    return values["share"] / 10


register_variant(
    Variant(
        name="tenth",
        title="Tenth",
        formula="α = share / 10",
        alpha=tenth_alpha,
        settings=(VariantSetting("share", 1.0, "of a tenth"),),
    )
)
