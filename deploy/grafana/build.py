"""Writes the dashboards: ``python deploy/grafana/build.py``. The JSON beside it is made from this file alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OUT = Path(__file__).parent / "dashboards"
_SELECT = 'model_name=~"$model", instance=~"$instance"'
_WIDTH, _HEIGHT = 8, 8


@dataclass(frozen=True)
class Panel:
    """One graph: ``queries`` are (PromQL, legend); ``note`` is shown to whoever hovers over the title."""

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    note: str = ""


def rate(name: str, by: str = "", where: str = "") -> str:
    """Per second, summed."""
    group = f" by ({by})" if by else ""
    return f"sum{group} (rate(pacellm_{name}_total{{{_SELECT}{where}}}[$__rate_interval]))"


def gauge(name: str, by: str, how: str = "sum") -> str:
    """A gauge over instances."""
    return f"{how} by ({by}) (pacellm_{name}{{{_SELECT}}})"


def quantiles(name: str) -> tuple[tuple[str, str], ...]:
    """Median, 95th and 99th percentile of a histogram."""
    rates = f"sum by (le) (rate(pacellm_{name}_bucket{{{_SELECT}}}[$__rate_interval]))"
    return tuple((f"histogram_quantile({q}, {rates})", f"p{round(100 * q)}") for q in (0.5, 0.95, 0.99))


def share(outcome: str) -> str:
    """An outcome's part of all reads, by layer."""
    part = rate("bank_reads", "layer", f', outcome="{outcome}"')
    return f"{part} / {rate('bank_reads', 'layer')}"


_DECEIVES = (
    "A high hit rate is not memory: one key merged everywhere hits always. Read it with effective rank and age. "
    "What the preset observe reads reaches no answer."
)
BANKS = (
    Panel(
        "Attention to what was called back",
        "percentunit",
        (
            (f"{rate('attention_called_back')} / {rate('attended_tokens')}", "called back"),
            (f"{rate('attention_by_lot')} / {rate('attended_tokens')}", "as much by lot"),
        ),
        "Working memory's hits: of decoded tokens' attention, in the layers that retrieve, the share that goes to "
        "blocks that were called back, and that would go to as many others of the history beside them. One turn in "
        "eight, its first eight tokens. Where both are alike, what was called back is not used.",
    ),
    Panel("Requests that called back", "cps", ((rate("recalls"), "requests"),)),
    Panel(
        "Requests by what is on",
        "cps",
        ((rate("requests_by_pa", "pa"), "{{pa}}"),),
        "observe: banks are fed and counted, answers are the plain model's. reference and paper change answers. Reads "
        "and writes below are of all of them; the label preset tells them apart.",
    ),
    Panel("Hit rate by layer", "percentunit", ((share("hit"), "layer {{layer}}"),), _DECEIVES),
    Panel(
        "Effective rank of the keys",
        "short",
        ((gauge("bank_effective_rank", "layer", "avg"), "layer {{layer}}"),),
        "Near 1, all keys point the same way and the bank holds one thing. Of the bank that finished last.",
    ),
    Panel(
        "Slot age, in writes",
        "short",
        ((gauge("bank_slot_age", "layer", "avg"), "layer {{layer}}"),),
        "Mean writes since a slot was changed. Near 0, nothing is older than the last segment.",
    ),
    Panel("Fuse rate by layer", "percentunit", ((share("fuse"), "layer {{layer}}"),), _DECEIVES),
    Panel("Miss rate by layer", "percentunit", ((share("miss"), "layer {{layer}}"),)),
    Panel("Slots filled", "short", ((gauge("bank_slots_filled", "layer", "avg"), "layer {{layer}}"),)),
    Panel("Merges", "cps", ((rate("bank_writes", "layer", ', kind="merge"'), "layer {{layer}}"),)),
    Panel("Replacements", "cps", ((rate("bank_writes", "layer", ', kind="replace"'), "layer {{layer}}"),)),
    Panel("Sessions by tier", "short", ((gauge("sessions_by_tier", "tier"), "{{tier}}"),)),
    Panel("Bytes by tier", "bytes", ((gauge("session_bytes", "tier, kind"), "{{tier}} {{kind}}"),)),
    Panel(
        "Evictions and restores",
        "cps",
        (
            (rate("session_evictions"), "evictions"),
            (rate("session_restores"), "restores"),
            (rate("sessions_lost"), "lost"),
        ),
    ),
    Panel(
        "Seconds of moving, per second",
        "s",
        ((rate("session_spill_seconds"), "down"), (rate("session_restore_seconds"), "up")),
    ),
)
SERVING = (
    Panel("Time to first token", "s", quantiles("time_to_first_token_seconds")),
    Panel("Inter-token latency", "s", quantiles("inter_token_latency_seconds")),
    Panel("Queue time", "s", quantiles("request_queue_time_seconds")),
    Panel("Prefill time", "s", quantiles("request_prefill_time_seconds")),
    Panel("Decode time", "s", quantiles("request_decode_time_seconds")),
    Panel("End to end", "s", quantiles("e2e_request_latency_seconds")),
    Panel(
        "Tokens per second",
        "short",
        (
            (rate("prompt_tokens"), "prompt, computed"),
            (rate("cached_prompt_tokens"), "prompt, cached"),
            (rate("generation_tokens"), "generated"),
        ),
    ),
    Panel(
        "Requests",
        "short",
        (
            (f"sum (pacellm_num_requests_running{{{_SELECT}}})", "running"),
            (f"sum (pacellm_num_requests_waiting{{{_SELECT}}})", "waiting"),
        ),
    ),
    Panel("KV memory in use", "percentunit", ((gauge("kv_cache_usage_perc", "instance", "max"), "{{instance}}"),)),
    Panel(
        "Ends of requests",
        "reqps",
        (
            (rate("request_success", "finished_reason"), "{{finished_reason}}"),
            (rate("request_failure"), "failed"),
            (rate("request_aborted"), "cancelled"),
        ),
    ),
    Panel("HTTP answers", "reqps", ((rate("http_responses", "status"), "{{status}}"),)),
    Panel(
        "Engine faults",
        "cps",
        ((rate("engine_faults", "place"), "{{place}}"),),
        "Failures outside the forward pass: each cost one request or operation, and the log names it.",
    ),
    Panel("Preemptions", "cps", ((rate("num_preemptions"), "preemptions"),)),
    Panel("Forward passes", "cps", ((rate("steps"), "passes"),)),
    Panel(
        "Share of prompt tokens not computed again",
        "percentunit",
        ((f"{rate('cached_prompt_tokens')} / ({rate('cached_prompt_tokens')} + {rate('prompt_tokens')})", "cached"),),
    ),
    Panel(
        "Prompts without most of their session's history",
        "cps",
        ((rate("session_dropped_histories"), "prompts"),),
        "Clients that send only what is new and do not ask for pacellm.append, or begin again under an old name.",
    ),
    Panel(
        "Tokens of histories left out",
        "cps",
        ((rate("session_dropped_tokens"), "tokens"),),
        "Few are usual: last answers made anew, or sent back another way.",
    ),
    Panel("Engine heartbeat age", "s", ((gauge("engine_heartbeat_age_seconds", "instance", "max"), "{{instance}}"),)),
)
_ACTIVITY = rate("expert_activity", "layer, expert")
EXPERTS = (
    Panel("Prompt tokens counted, by layer", "short", ((rate("expert_activity", "layer"), "layer {{layer}}"),)),
    Panel(
        "Share of the busiest expert",
        "percentunit",
        ((f"max by (layer) ({_ACTIVITY}) / {rate('expert_activity', 'layer')}", "layer {{layer}}"),),
        "Far above one over the number of experts: prompts lean on few of them.",
    ),
    Panel(
        "Share of the eight busiest",
        "percentunit",
        (
            (
                f"sum by (layer) (topk by (layer) (8, {_ACTIVITY})) / {rate('expert_activity', 'layer')}",
                "layer {{layer}}",
            ),
        ),
        "What a small working set would still see.",
    ),
    Panel("The ten busiest experts", "short", ((f"topk(10, {_ACTIVITY})", "layer {{layer}}, expert {{expert}}"),)),
)
DASHBOARDS = {
    "banks": ("Memory banks", BANKS),
    "serving": ("Serving", SERVING),
    "experts": ("Experts", EXPERTS),
}


def dashboard(name: str) -> dict[str, Any]:
    """Grafana's JSON of one dashboard."""
    title, panels = DASHBOARDS[name]
    return {
        "uid": f"pacellm-{name}",
        "title": f"PaceLLM: {title}",
        "tags": ["pacellm"],
        "schemaVersion": 39,
        "version": 1,
        "editable": False,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus"},
                _variable("model", "label_values(pacellm_num_requests_running, model_name)"),
                _variable("instance", 'label_values(pacellm_num_requests_running{model_name=~"$model"}, instance)'),
            ]
        },
        "panels": [_panel(number, panel) for number, panel in enumerate(panels)],
    }


def _variable(name: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "includeAll": True,
        "allValue": ".*",
        "multi": True,
    }


def _panel(number: int, panel: Panel) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${datasource}"}
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.note,
        "datasource": source,
        "gridPos": {"h": _HEIGHT, "w": _WIDTH, "x": number % 3 * _WIDTH, "y": number // 3 * _HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(65 + index), "datasource": source, "expr": expr, "legendFormat": legend}
            for index, (expr, legend) in enumerate(panel.queries)
        ],
    }


def text(name: str) -> str:
    """What the file says."""
    return json.dumps(dashboard(name), indent=1) + "\n"


if __name__ == "__main__":
    for each in DASHBOARDS:
        (OUT / f"{each}.json").write_text(text(each))
