import pytest

from gradaug_hf.slimming.analysis.axes import (
    Unit,
    axis_of,
    axis_size,
    concat,
    fix,
    fixed,
    free_units,
    product,
    resolve,
    split,
    tie,
    unflatten,
)


def units(axis):
    """The axis as nested lists of (size, free)."""
    return [[(unit.size, unit.free) for unit in segment] for segment in resolve(axis)]


def test_tied_units_are_one():
    a, b, c = (axis_of(Unit(8)) for _ in range(3))
    tie(a, b, "sum")
    tie(b, c, "sum")
    assert len(free_units([a, b, c])) == 1
    fix(c, "output")
    assert free_units([a]) == []
    assert resolve(a)[0][0].reason == "output"


def test_a_unit_tied_to_a_concatenation_is_cut_like_it():
    stream, left, right = axis_of(Unit(10)), axis_of(Unit(6)), axis_of(Unit(4))
    tie(stream, concat([left, right]), "sum")
    assert units(stream) == [[(6, True)], [(4, True)]]
    assert free_units([stream]) == free_units([left, right])


def test_concatenations_that_are_cut_differently_are_cut_at_both_places():
    a = concat([axis_of(Unit(6)), axis_of(Unit(4))])
    b = concat([axis_of(Unit(3)), axis_of(Unit(7))])
    tie(a, b, "sum")
    assert units(a) == units(b) == [[(3, True)], [(3, True)], [(4, True)]]


def test_a_view_splits_a_unit_into_factors_and_flattening_restores_it():
    channels = axis_of(Unit(192))
    heads, size = unflatten(channels, [3, 64], "view")
    assert units(product([heads, size])) == units(channels) == [[(3, True), (64, True)]]


def test_a_shuffle_permutes_the_factors():
    channels = axis_of(Unit(12))
    groups, members = unflatten(channels, [3, 4], "view")
    fix(groups, "groups")
    shuffled = product([members, groups])
    assert units(shuffled) == [[(4, True), (3, False)]]


def test_factors_are_refined_to_a_common_structure():
    grouped = product([fixed(4), axis_of(Unit(6))])
    other = product([fixed(8), axis_of(Unit(3))])
    tie(grouped, other, "groups")
    assert units(grouped) == units(other) == [[(8, False), (3, True)]]


def test_structures_without_a_common_refinement_stay_whole_with_the_reason():
    a = product([axis_of(Unit(2)), axis_of(Unit(3))])
    b = product([axis_of(Unit(3)), axis_of(Unit(2))])
    tie(a, b, "they do not fit")
    assert free_units([a, b]) == []


def test_pieces_of_a_unit_can_be_tied_to_each_other():
    hidden = axis_of(Unit(8))
    gate, value = split(hidden, [4, 4], "chunk")
    tie(gate, value, "product")
    assert units(hidden) == [[(4, True)], [(4, True)]]
    assert len(free_units([hidden])) == 1


def test_a_concatenation_under_a_repeat_is_written_out():
    pair = concat([axis_of(Unit(2)), axis_of(Unit(3))])
    assert units(product([fixed(2), pair])) == [[(2, True)], [(3, True)], [(2, True)], [(3, True)]]
    assert axis_size(product([pair, fixed(2)])) == 10


def test_tying_different_sizes_is_a_mistake():
    with pytest.raises(ValueError, match="size 3 to .* of size 4"):
        tie(fixed(3), fixed(4), "")
