"""PromQL of the dashboards' panels, over the chosen models and instances."""

from __future__ import annotations

from pacellm.memory.reads import OUTCOMES

Query = tuple[str, str]
"""An expression, and what its lines are called."""
SELECT = 'model_name=~"$model", instance=~"$instance"'
_PROCESS = f"and on (instance, job) pacellm_num_requests_running{{{SELECT}}}"  # series of a process have no model


def rate(name: str, by: str = "", where: str = "") -> str:
    """Of a counter: per second, summed."""
    return f"sum{_by(by)} (rate(pacellm_{name}_total{{{SELECT}{where}}}[$__rate_interval]))"


def seen(name: str, by: str = "") -> str:
    """The same, without what has never happened."""
    return f"{rate(name, by)} and sum{_by(by)} (pacellm_{name}_total{{{SELECT}}}) > 0"


def part(some: str, whole: str) -> str:
    """Some of a whole, where there is any."""
    return f"{some} / ({whole} > 0)"


def gauge(name: str, by: str = "", how: str = "sum") -> str:
    """A gauge over instances."""
    return f"{how}{_by(by)} (pacellm_{name}{{{SELECT}}})"


def outcome_rate(counter: str, by: str = "", where: str = "") -> str:
    """Of bank reads, as :func:`pacellm.memory.reads.rates` defines it; ``counter`` is one of ``OUTCOMES``."""
    one = f'{where}, outcome="{OUTCOMES[counter]}"'
    return part(rate("bank_reads", by, one), rate("bank_reads", by, where))


def outcomes(where: str) -> tuple[Query, ...]:
    """The rate of each outcome of bank reads; they add up to 1. Hits come first: stacked, they are the hit rate."""
    return tuple((outcome_rate(counter, where=where), word) for counter, word in OUTCOMES.items())


def quantile(share: float, name: str, by: str = "") -> str:
    """Of a histogram."""
    labels = f"{by}, le" if by else "le"
    return f"histogram_quantile({share}, {_buckets('rate', name, labels)})"


def quantiles(name: str) -> tuple[Query, ...]:
    """Median, 95th and 99th percentile of a histogram, and its mean."""
    total, count = (f"sum (rate(pacellm_{name}_{what}{{{SELECT}}}[$__rate_interval]))" for what in ("sum", "count"))
    found = [(quantile(share, name), f"p{round(100 * share)}") for share in (0.5, 0.95, 0.99)]
    return (*found, (part(total, count), "mean"))


def buckets(name: str) -> tuple[Query, ...]:
    """How many values of a histogram came, by size: for a heatmap."""
    return ((_buckets("increase", name, "le"), "{{le}}"),)


def process(name: str, how: str = "") -> str:
    """What the operating system says of a server's process; ``how`` is a function of a range."""
    series = f"process_{name}" + ("[$__rate_interval]" if how else "")
    return f"({how}({series})) {_PROCESS}" if how else f"{series} {_PROCESS}"


def _buckets(how: str, name: str, by: str) -> str:
    return f"sum by ({by}) ({how}(pacellm_{name}_bucket{{{SELECT}}}[$__rate_interval]))"


def _by(labels: str) -> str:
    return f" by ({labels})" if labels else ""
