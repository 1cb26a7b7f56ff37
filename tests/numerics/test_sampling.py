import torch
from hypothesis import given
from hypothesis import strategies as st

from agzo_edge.numerics.sampling import drawn_tokens, uniform_numbers


def test_tokens_are_drawn_as_often_as_their_probabilities_say() -> None:
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0]).expand(20_000, -1)
    numbers = uniform_numbers(20_000, seed=3, step=0, position=0, first_example=0)
    shares = torch.bincount(drawn_tokens(logits, numbers), minlength=4) / 20_000
    torch.testing.assert_close(shares, logits[0].softmax(-1), rtol=0, atol=0.015)


@given(
    st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=20),
    st.floats(0, 1, exclude_min=True, exclude_max=True),
)
def test_a_drawn_token_is_the_one_whose_stretch_holds_the_number(logits: list[float], number: float) -> None:
    token = int(drawn_tokens(torch.tensor([logits]), torch.tensor([number], dtype=torch.float64)))
    p = torch.tensor(logits).softmax(-1).double()
    assert p[:token].sum() <= number * p.sum() + 1e-12
    assert number * p.sum() <= p[: token + 1].sum() + 1e-12


def test_an_impossible_token_is_never_drawn() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf]] * 3)
    assert drawn_tokens(logits, torch.tensor([1e-12, 0.5, 1 - 1e-12], dtype=torch.float64)).tolist() == [1, 1, 1]


def test_each_example_step_and_position_has_its_own_number_whatever_the_batch() -> None:
    key = {"seed": 1, "step": 2, "position": 3}
    whole = uniform_numbers(6, first_example=0, **key)
    assert torch.equal(whole[4:], uniform_numbers(2, first_example=4, **key))
    others = [{"seed": 2}, {"step": 3}, {"position": 4}]
    drawn = torch.cat([whole, *(uniform_numbers(6, first_example=0, **(key | other)) for other in others)])
    assert drawn.unique().numel() == 24
    assert 0 < drawn.min() <= drawn.max() < 1
