"""Writes the dashboards: ``python -m deploy.grafana.build``. The JSON beside it is made from this file alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deploy.grafana.panels import Panel, laid_out
from deploy.grafana.queries import (
    buckets,
    gauge,
    outcome_rate,
    outcomes,
    part,
    process,
    quantile,
    quantiles,
    rate,
    seen,
)

OUT = Path(__file__).parent / "dashboards"
_DECEIVES = (
    "Hits, of all reads, those of an empty bank included. A high hit rate is not memory: one key merged everywhere "
    "hits always. Read it with effective rank and age. What the preset observe reads reaches no answer."
)
_CALLED_BACK, _BY_LOT = (
    part(rate(name), rate("attended_tokens")) for name in ("attention_called_back", "attention_by_lot")
)
_USED = (
    "Working memory's hits: of decoded tokens' attention, in the layers that retrieve, the share that goes to blocks "
    "that were called back, and that would go to as many others of the history beside them. One turn in eight, its "
    "first eight tokens. Where both are alike, what was called back is not used."
)
_RANK = (
    "Near 1, all keys point the same way and the bank holds one thing. Of banks as requests that finished left them."
)
_AGE = "Mean writes since a slot was changed. Near 0, nothing is older than the last segment."
BANKS = (
    Panel("Attention called back", "percentunit", ((_CALLED_BACK, "called back"),), _USED, "stat"),
    Panel("As much by lot", "percentunit", ((_BY_LOT, "by lot"),), _USED, "stat"),
    Panel("Requests that called back", "cps", ((rate("recalls"), "requests"),), kind="stat"),
    Panel("Hit rate", "percentunit", ((outcome_rate("hits"), "hits"),), _DECEIVES, "stat"),
    Panel("Effective rank, median", "short", ((quantile(0.5, "bank_effective_rank"), "rank"),), _RANK, "stat"),
    Panel("Sessions", "short", ((gauge("sessions"), "sessions"),), kind="stat"),
    Panel(
        "Attention to what was called back",
        "percentunit",
        ((_CALLED_BACK, "called back"), (_BY_LOT, "as much by lot")),
        _USED,
    ),
    Panel("Requests that called back", "cps", ((rate("recalls"), "requests"),)),
    Panel(
        "Requests by what is on",
        "cps",
        ((seen("requests_by_pa", "pa"), "{{pa}}"),),
        "observe: banks are fed and counted, answers are the plain model's. reference and paper change answers. Reads "
        "and writes below are of all of them; the label preset tells them apart.",
    ),
    Panel("Hit rate by layer", "percentunit", ((outcome_rate("hits", "layer"), "layer {{layer}}"),), _DECEIVES),
    Panel(
        "Effective rank of the keys, median",
        "short",
        ((quantile(0.5, "bank_effective_rank", "layer"), "layer {{layer}}"),),
        _RANK,
    ),
    Panel("Effective rank of the keys", "short", buckets("bank_effective_rank"), _RANK, "heatmap"),
    Panel(
        "What reads came to, layer $layer",
        "percentunit",
        outcomes(', layer=~"$layer"'),
        "Of all reads, a token at this layer each. empty: the bank had nothing in it yet.",
        "stacked",
        repeat="layer",
    ),
    Panel("Slot age in writes, median", "short", ((quantile(0.5, "bank_slot_age", "layer"), "layer {{layer}}"),), _AGE),
    Panel("Slot age in writes", "short", buckets("bank_slot_age"), _AGE, "heatmap"),
    Panel("Slots filled, median", "short", ((quantile(0.5, "bank_slots_filled", "layer"), "layer {{layer}}"),)),
    Panel("Merges", "cps", ((rate("bank_writes", "layer", ', kind="merge"'), "layer {{layer}}"),)),
    Panel("Replacements", "cps", ((rate("bank_writes", "layer", ', kind="replace"'), "layer {{layer}}"),)),
    Panel("Sessions by tier", "short", ((gauge("sessions_by_tier", "tier"), "{{tier}}"),)),
    Panel("Bytes by tier", "bytes", ((f"{gauge('session_bytes', 'tier, kind')} > 0", "{{tier}} {{kind}}"),)),
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
        "Share of the time spent moving",
        "percentunit",
        ((rate("session_spill_seconds"), "down"), (rate("session_restore_seconds"), "up")),
        "Of each second, by the thread that copies. Several servers are added up.",
    ),
)
_FAILED, _ENDED = rate("request_failure"), f"({rate('request_failure')} + {rate('request_success')})"
SERVING = (
    Panel("Servers", "short", ((gauge("num_requests_running", how="count"), "servers"),), kind="stat"),
    Panel(
        "Requests",
        "short",
        ((gauge("num_requests_running"), "running"), (gauge("num_requests_waiting"), "waiting")),
        kind="stat",
    ),
    Panel("Time to first token, p95", "s", ((quantile(0.95, "time_to_first_token_seconds"), "p95"),), kind="stat"),
    Panel("Tokens generated per second", "short", ((rate("generation_tokens"), "tokens"),), kind="stat"),
    Panel("KV memory in use", "percentunit", ((gauge("kv_cache_usage_perc", how="max"), "fullest"),), kind="stat"),
    Panel("Requests that fail", "percentunit", ((part(_FAILED, _ENDED), "failed"),), kind="stat"),
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
            (gauge("num_requests_running"), "running"),
            (gauge("num_requests_waiting"), "waiting"),
        ),
    ),
    Panel("KV memory in use", "percentunit", ((gauge("kv_cache_usage_perc", "instance", "max"), "{{instance}}"),)),
    Panel(
        "Ends of requests",
        "reqps",
        (
            (seen("request_success", "finished_reason"), "{{finished_reason}}"),
            (seen("request_failure"), "failed"),
            (seen("request_aborted"), "cancelled"),
        ),
    ),
    Panel("HTTP answers", "reqps", ((seen("http_responses", "status"), "{{status}}"),)),
    Panel(
        "Engine faults",
        "cps",
        ((rate("engine_faults"), "all"), (seen("engine_faults", "place"), "{{place}}")),
        "Failures outside the forward pass: each cost one request or operation, and the log names it.",
    ),
    Panel("Preemptions", "cps", ((rate("num_preemptions"), "preemptions"),)),
    Panel("Forward passes", "cps", ((rate("steps"), "passes"),)),
    Panel(
        "Share of prompt tokens not computed again",
        "percentunit",
        (
            (
                part(rate("cached_prompt_tokens"), f"({rate('cached_prompt_tokens')} + {rate('prompt_tokens')})"),
                "cached",
            ),
        ),
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
    Panel("Tokens of prompts", "short", quantiles("request_prompt_tokens"), "Those not computed again included."),
    Panel("Tokens of answers", "short", quantiles("request_generation_tokens")),
    Panel(
        "Processors in use",
        "short",
        ((process("cpu_seconds_total", "rate"), "{{instance}}"),),
        "By the server's own process; a model split over processes has others.",
    ),
    Panel("Memory of the process", "bytes", ((process("resident_memory_bytes"), "{{instance}}"),)),
    Panel("Open files and connections", "short", ((process("open_fds"), "{{instance}}"),)),
)
_ACTIVITY = rate("expert_activity", "layer, expert")
EXPERTS = (
    Panel("Prompt tokens counted, by layer", "short", ((rate("expert_activity", "layer"), "layer {{layer}}"),)),
    Panel(
        "Share of the busiest expert",
        "percentunit",
        ((part(f"max by (layer) ({_ACTIVITY})", rate("expert_activity", "layer")), "layer {{layer}}"),),
        "Far above one over the number of experts: prompts lean on few of them.",
    ),
    Panel(
        "Share of the eight busiest",
        "percentunit",
        (
            (
                part(f"sum by (layer) (topk by (layer) (8, {_ACTIVITY}))", rate("expert_activity", "layer")),
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
    variables = [
        {"name": "datasource", "type": "datasource", "query": "prometheus", "hide": 0, "skipUrlSync": False},
        _variable("model", "label_values(pacellm_num_requests_running, model_name)") | {"allValue": ".*"},
        _variable("instance", 'label_values(pacellm_num_requests_running{model_name=~"$model"}, instance)')
        | {"allValue": ".*"},
    ]
    if any(panel.repeat == "layer" for panel in panels):  # all of them by name: the panels are repeated for each
        variables.append(_variable("layer", 'label_values(pacellm_bank_reads_total{model_name=~"$model"}, layer)'))
    return {
        "uid": f"pacellm-{name}",
        "title": f"PaceLLM: {title}",
        "tags": ["pacellm"],
        "style": "dark",
        "schemaVersion": 39,
        "version": 1,
        "editable": False,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": variables},
        "annotations": {"list": []},
        "links": [_OTHERS],
        "panels": laid_out(panels),
    }


_OTHERS = {
    "type": "dashboards",
    "title": "PaceLLM",
    "tags": ["pacellm"],
    "asDropdown": False,
    "includeVars": True,
    "keepTime": True,
    "targetBlank": False,
    "icon": "dashboard",
    "tooltip": "",
    "url": "",
}


def _variable(name: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "sort": 3,
        "hide": 0,
        "skipUrlSync": False,
        "includeAll": True,
        "multi": True,
    }


def text(name: str) -> str:
    """What the file says."""
    return json.dumps(dashboard(name), indent=1) + "\n"


if __name__ == "__main__":
    for each in DASHBOARDS:
        (OUT / f"{each}.json").write_text(text(each))
