"""Environment variables that would ship prompts to somebody else, as langsmith 0.14 and OpenTelemetry 1.45 read them.

LangGraph reports to LangSmith whenever one of four switches says so, without a word. Its further variables (OpenTelemetry copies, replicas)
do nothing by themselves, so they are named only beside a switch. Our own spans never take an address from the environment: the recorder has
its own provider. An instrumented process is another matter: there a global provider is set, and may carry prompts to the address named.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from urllib.parse import urlsplit

SPACES = ("LANGSMITH", "LANGCHAIN")
SWITCHES = tuple(f"{space}_{name}" for name in ("TRACING_V2", "TRACING") for space in SPACES)
COPIES = tuple(f"{space}_{name}" for name in ("OTEL_ENABLED", "OTEL_ONLY") for space in SPACES)
MODES = tuple(f"{space}_TRACING_MODE" for space in SPACES)
REPLICAS = "LANGSMITH_RUNS_ENDPOINTS"
ADDRESSES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


def uploads() -> Iterator[str]:
    """One line for each variable that would ship prompts."""
    switches = [name for name in SWITCHES if _on(name)]
    place = _host("LANGSMITH_ENDPOINT") or _host("LANGCHAIN_ENDPOINT") or "api.smith.langchain.com"
    for name in switches:
        yield f"{name} is set, so LangGraph sends prompts to LangSmith ({place}); unset it to keep them here"
    copied = [name for name in COPIES if _on(name)] + [name for name in MODES if os.environ.get(name, "").lower() in ("otel", "hybrid")]
    if switches and copied:
        where = next((found for name in ADDRESSES if (found := _host(name))), place)
        for name in copied:
            yield f"{name} is set, so LangSmith's client also sends prompts by OpenTelemetry to {where}; unset it to keep them here"
    if switches and os.environ.get(REPLICAS, "").strip():
        yield f"{REPLICAS} is set, so LangSmith's client sends copies of prompts to the services it names; unset it to keep them here"
    if _instrumented():
        for name in ADDRESSES:
            if _host(name):
                yield f"{name} is set and the process is instrumented, so prompts may go to {_host(name)}; unset it to keep them here"


def _on(name: str) -> bool:
    return os.environ.get(name, "").strip().lower() in ("true", "1", "yes", "on")


def _host(name: str) -> str:
    """Where an address leads, without the passwords that it may hold."""
    value = os.environ.get(name, "").strip()
    return urlsplit(value if "//" in value else f"//{value}").hostname or "" if value else ""


def _instrumented() -> bool:
    """A global tracer provider that exports is set in this process."""
    if "opentelemetry.trace" not in sys.modules and "OTEL_PYTHON_TRACER_PROVIDER" not in os.environ:
        return False
    from opentelemetry import trace

    return hasattr(trace.get_tracer_provider(), "add_span_processor")
