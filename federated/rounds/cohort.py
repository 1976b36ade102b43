"""Who takes part in a round: a function of seed and round alone, the same on all engines."""

from __future__ import annotations

from federated.config.seeding import generator


def sample_cohort(seed: int, server_round: int, num_clients: int, cohort_size: int) -> list[int]:
    """Draw the clients of a round without replacement; a function of seed and round alone.

    Returns:
        Client ids in ascending order.
    """
    if cohort_size >= num_clients:
        return list(range(num_clients))
    rng = generator(seed, "cohort", server_round)
    return sorted(int(i) for i in rng.choice(num_clients, size=cohort_size, replace=False))
