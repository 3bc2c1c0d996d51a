"""A run killed at random moments loses no measurement, and gives the bytes of an undisturbed run."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from faults import job
from faults.kills import Campaign
from faults.warm import Warm

KILLS, STOPS = 15, 5
TASK = Path(job.__file__)


def test_a_killed_run_gives_the_same_bytes_and_repeats_next_to_nothing(
    warm: Warm, ckpts: Path, tmp_path: Path, tally: Counter[str]
):
    campaign = Campaign(warm, tmp_path, TASK, ckpts, seed=3)
    campaign.run(campaign.measure(("aswa", "sewa --k 3 --steps 25", "twa --epochs 2")), KILLS, STOPS)
    del campaign.counts["places"]
    tally.update(campaign.counts)
    assert not campaign.wrong and (campaign.counts["kills"], campaign.counts["stops"]) == (KILLS, STOPS)
