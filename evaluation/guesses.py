"""The blind test in the report: how often people told the real replies from the generated ones."""

from evaluation.run_files import RunFiles, read_file
from support.errors import amount
from talking.guesses import CONFIDENCE, ENOUGH, GUESSES, read_guesses, score_of


def describe_guesses(run: RunFiles) -> str:
    """The result of all guesses in a few sentences, or an empty string if there are none."""
    guesses = read_file(run, GUESSES, list, read_guesses)
    if not guesses:
        return ""
    score = score_of(guesses)
    replies = len({(guess["part"], guess["dialogue"], guess["turn"]) for guess in guesses})
    count = amount(score.guesses, "guess", "guesses")
    found = f"The real reply was recognised in {score.right:,} of {count}, on {amount(replies, 'reply', 'replies')}"
    if score.guesses < ENOUGH:
        return f"{found}. Chance is 50%. {ENOUGH} guesses are needed for an interval."
    low, high = score.interval()
    place = "above" if low > 0.5 else "below" if high < 0.5 else "not distinguishable from"
    return (
        f"{found}: {score.right / score.guesses:.0%}, with a {CONFIDENCE:.0%} interval of {low:.0%} to {high:.0%}."
        f" That is {place} chance (50%)."
    )
