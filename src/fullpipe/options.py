"""Every option that a user may set, once, with its default and what it does. The command line, `LLM` and
`fullpipe serve` read them here, so an option has one name everywhere: that of vLLM where vLLM has it.

    options = Options.of(model="smollm2-135m", stages=4)
    options.pipeline.stages
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self, TypeVar

import msgspec

from fullpipe.errors import UsageError

DEFAULT_MODEL = "qwen2.5-coder-1.5b"
DTYPES = ("auto", "float32", "bfloat16", "stored")
QUANTIZATIONS = ("int8", "int4")
KV_CACHE_DTYPES = ("auto", "float16", "float32", "int8")
BLOCK = 256
"""Slots of a block of cache memory."""

TOOL_CALL_PARSERS = ("auto", "none", "hermes", "llama3_json", "mistral")
REASONING_PARSERS = ("none", "deepseek_r1", "qwen3")
LOG_LEVELS = ("critical", "error", "warning", "info", "debug")

_DEVICE = re.compile(r"cpu|cuda(:\d+)?")
# Options of the pipeline that need no stage processes; those that need several hosts.
_ANYWHERE = ("stages", "hosts", "device", "kv_pool_mib", "kv_cache_dtype", "threads")
_OF_HOSTS = ("ray_address", "interface", "host_ip", "data_port", "plan", "adaptive", "host_timeout")
_LONGEST_S = 86_400.0  # the system's own waits overflow at 24 days


def option(default: Any, help: str, *flags: str, metavar: str | None = None) -> Any:
    """A field that the command line offers. flags: other spellings than `--its-name`. A field that is made without this
    is for Python alone."""
    return field(default=default, metadata={"help": help, "flags": flags, "metavar": metavar})


_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")  # of apps too


def _refuse_unless(*checks: tuple[bool, str]) -> None:
    for ok, what in checks:
        if not ok:
            raise UsageError(what)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """Which model answers, and which draft guesses. margins: report of every token how far it stood above the second
    best (`Completion.margins`)."""

    model: str = option(DEFAULT_MODEL, "Catalogue name, safetensors directory, GGUF file, or Hugging Face id.",
                        "--model", "-m")
    draft: str = option("auto", "Who guesses: auto (ngram, and the model's partner; in one process where they pay), "
                        "none, ngram, a model, a draft module (spd:DIR, exit:DIR), or several with commas between.",
                        "--draft", "-d")
    dtype: str = option("auto", "float32, bfloat16, stored (weights as the file has them, on the native kernels), or "
                        "auto: stored if they are quantised or have 16 bits, else bfloat16 where the processor has it.")
    quantization: str | None = option(None, "Quantise weights of 16 or 32 bits while they are read: int8, or int4 "
                                      "(embedding and head int8). On the processor, of target and draft model.",
                                      "--quantization", "-q")
    lora: str | None = option(None, "LoRA adapter to merge into the model while it is read: a folder of peft's. It is "
                              "served under NAME, or the folder's.", metavar="[NAME=]DIR")
    max_model_len: int | None = option(None, "Tokens of prompt and answer together. Default: what the model takes.")
    chat_template: str | None = option(None, "File with the chat template to use in place of the model's, or the "
                                       "template itself.", metavar="FILE")
    default_chat_template_kwargs: dict[str, Any] | None = option(None, "What chat templates are told besides, as a "
                                                                 'JSON object: {"enable_thinking": false}.')
    generation_config: str = option("auto", "Whose sampling counts where a request says nothing: auto (the model's "
                                    "files'), none, or that of a folder with a generation_config.json.")
    margins: bool = False

    def __post_init__(self) -> None:
        length = self.max_model_len
        if self.dtype not in DTYPES:
            raise UsageError(f"unknown dtype {self.dtype!r}", hint=f"Known are: {', '.join(DTYPES)}.")
        if self.quantization is not None and self.quantization not in QUANTIZATIONS:
            raise UsageError(f"unknown quantization {self.quantization!r}", param="quantization",
                             hint=f"Known are: {', '.join(QUANTIZATIONS)}. Files that are quantised need none.")
        if self.lora is not None and (not self.lora.strip() or self.lora[0] == "=" or self.lora[-1] == "="):
            raise UsageError(f"{self.lora!r} names no LoRA adapter", param="lora",
                             hint="Write its folder, or `lora=NAME=DIR`.")
        _refuse_unless((length is None or length >= 1, f"max_model_len must be 1 or more (got {length})"))

    @property
    def adapter(self) -> tuple[str, Path] | None:
        """Name and folder of the LoRA adapter; None without one."""
        if self.lora is None:
            return None
        is_named = "=" in self.lora.partition("/")[0]
        name, _, folder = self.lora.partition("=") if is_named else ("", "", self.lora)
        path = Path(folder).expanduser().absolute()
        return name or path.name, path


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodOptions:
    """Which nodes enter the pipeline, and when (`fullpipe.methods`, which also checks the values)."""

    method: str = option("auto", "Which nodes enter the pipeline, and when. auto: fullpipe on stages; in one process "
                         "chain, or pp where guessing does not pay.")
    width: int | None = option(None, "Tree nodes of a request per flight at most. Default: the method's own; pp and "
                               "chain have none.")
    depth: int | None = option(None, "Tokens guessed per traversal; for chain and static-tree alone.")
    floor: float | None = option(None, "Least probability of a guess, given the text so far. Default: the method's "
                                 "own.")
    refresh: bool | None = option(None, "Ask the draft again about tokens in flight; for spd and fullpipe alone. "
                                  "Default: with spd:DIR, which answers better each time.")
    prefill_share: float | None = option(None, "By how much tokens may slow down while a prompt comes in, as a share; "
                                         "for fullpipe alone. Default: 1.")


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineOptions:
    """Where the model runs."""

    stages: int | None = option(None, "Processes on this machine to cut the model over, and one more for the draft. "
                                "Without any, it runs in this process. With `hosts`: how many of them have a stage.")
    hosts: str | None = option(None, "Run on several hosts: ray (all of a Ray cluster), or a hosts file (TOML) that "
                               "names those of it that take part.", metavar="ray|FILE")
    ray_address: str | None = option(None, "Head of the Ray cluster, HOST:PORT. Default: RAY_ADDRESS, else this "
                                     "machine's Ray.")
    interface: str | None = option(None, "Network interface of this host by which the others reach it.")
    host_ip: str | None = option(None, "Address of this host at which the others reach it. Default: that by which it "
                                 "reaches them.")
    data_port: int = option(0, "Port of this host at which the others reach it; 0: any that is free.")
    plan: str | None = option(None, "Who sits where, as `fullpipe plan` wrote it, edited or not. Default: the best "
                              "plan for these hosts.", metavar="FILE")
    adaptive: bool = option(True, "Cut the model anew, at a quiet moment, when hosts come or become slower.")
    host_timeout: float = option(3.0, "Silence of a station on another host after which it counts as lost.",
                                 metavar="SECONDS")
    device: str = option("cpu", "What stages and draft model compute on: cpu, cuda, or cuda:N for one of several GPUs.")
    kv_pool_mib: int | None = option(None, "Cache memory of each stage, and as much of a draft model, in MiB; it "
                                     "bounds how long texts may be, and how many run at a time. On a GPU it is taken "
                                     "at the start. Default: a quarter of what is free for each, for 131,072 tokens at "
                                     "most.")
    kv_cache_dtype: str = option("auto", "Keys and values in the cache of stages and draft model: auto (float16 on the "
                                 "native kernels, else the dtype); for these kernels alone float16, float32, or int8, "
                                 "which takes 56% to 63% of the memory of float16.")
    threads: int | None = option(None, "Compute threads of each stage process (if not said: 1), or of this one (all "
                                 "cores).")
    link_ms: float = option(0.0, "Emulate links between the stages: one-way latency in milliseconds.")
    link_mbit: float | None = option(None, "Emulate links between the stages: bandwidth in Mbit/s. Default: unlimited.")
    timeout: float = option(60.0, "Time without progress after which a stage process counts as hung.",
                            metavar="SECONDS")
    start_timeout: float = option(300.0, "Time that the stage processes may take to start.", metavar="SECONDS")

    def __post_init__(self) -> None:
        if not _DEVICE.fullmatch(self.device):
            raise UsageError(f"unknown device {self.device!r}", param="device",
                             hint="Known are cpu, cuda, and cuda:0, cuda:1, ...")
        if self.kv_cache_dtype not in KV_CACHE_DTYPES:
            raise UsageError(f"unknown kv_cache_dtype {self.kv_cache_dtype!r}", param="kv_cache_dtype",
                             hint=f"Known are: {', '.join(KV_CACHE_DTYPES)}.")
        _refuse_unless(
            (self.kv_pool_mib is None or self.kv_pool_mib >= 1,
             f"kv_pool_mib must be 1 or more (got {self.kv_pool_mib})"),
            (self.threads is None or self.threads >= 1, f"threads must be 1 or more (got {self.threads})"),
            (0 <= self.link_ms < math.inf, f"the link latency must be 0 or more (got {self.link_ms} ms)"),
            (self.link_mbit is None or self.link_mbit > 0,
             f"the links' bandwidth must be above 0 (got {self.link_mbit} Mbit/s)"),
            (self.timeout > 0, f"the time-out must be above 0 (got {self.timeout:g} s)"),
            (0 < self.start_timeout <= _LONGEST_S,
             f"the time to start must be above 0 and at most a day (got {self.start_timeout:g} s)"),
            (0 <= self.data_port < 65536, f"data_port must be below 65536 (got {self.data_port})"),
            (0.5 <= self.host_timeout <= _LONGEST_S,
             f"host_timeout must be half a second or more (got {self.host_timeout:g} s)"))
        if self.hosts is None:
            self._refuse_what_needs_hosts()
        elif self.link_ms or self.link_mbit:
            raise UsageError("links between hosts are real, and cannot be emulated",
                             hint="Leave out `link_ms` and `link_mbit`, or `hosts`.")
        if self.stages is None and self.hosts is None:
            self._refuse_what_needs_stages()

    def _refuse_what_needs_hosts(self) -> None:
        for one in fields(self):
            if one.name in _OF_HOSTS and getattr(self, one.name) != one.default:
                raise UsageError(f"{one.name} is for several hosts, and there is one", param=one.name,
                                 hint="Name the hosts: `hosts=ray`.")

    def _refuse_what_needs_stages(self) -> None:
        for one in fields(self):
            if one.name not in (*_ANYWHERE, *_OF_HOSTS) and getattr(self, one.name) != one.default:
                raise UsageError(f"{one.name} is for stage processes, and there are none",
                                 hint="Say how many there shall be: `stages=2`.")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How requests share the stations.

    Cache memory has the bound of the station with the least room, or a lower one. A request begins with few blocks and
    takes more; one that does not fit waits; and where there is none left, the youngest goes back to waiting, to be
    computed again from what it has emitted.
    Prefixes can be shared only within such a bound, and not with drafts that read hidden states: of rows that are not
    computed they never come.

    prefill_chunk: prompt tokens of a request in one flight at most. fanout: guesses that the draft is asked for per
    node. spare_slots: slots of a request beyond prompt and answer, for speculation; None: enough for the method.
    block_size: slots that are handed to a request at once.
    """

    max_num_seqs: int | None = option(None, "Requests that run at a time; the others wait.")
    kv_cache_tokens: int | None = option(None, "Cache slots of all requests together, on each stage, if that is to be "
                                         "less than `kv_pool_mib` has room for.")
    enable_prefix_caching: bool = option(False, "Let requests that begin alike share what is computed; off with draft "
                                         "modules.")
    prefill_chunk: int = 256
    fanout: int = 16
    spare_slots: int | None = None
    block_size: int = BLOCK

    def __post_init__(self) -> None:
        for name, least in (("max_num_seqs", 1), ("kv_cache_tokens", 1), ("prefill_chunk", 1), ("fanout", 1),
                            ("spare_slots", 0), ("block_size", 1)):
            value = getattr(self, name)
            _refuse_unless((value is None or value >= least, f"{name} must be {least} or more (got {value})"))
        if self.kv_cache_tokens is not None and self.kv_cache_tokens < self.block_size:
            raise UsageError(f"{self.kv_cache_tokens} cache slots are less than a block of {self.block_size}",
                             hint="Give more `kv_cache_tokens`.", param="kv_cache_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """Doors and limits of `fullpipe serve`."""

    host: str = option("127.0.0.1", "Address to listen on; 0.0.0.0 for all.")
    port: int = option(8000, "Port to listen on.")
    api_key: tuple[str, ...] = option((), "Key that opens /v1 and the page's feed; may be repeated. If not given, "
                                      "FULLPIPE_API_KEY, which is one key. None: open to all who reach it.")
    api_key_file: str | None = option(None, "File with more such keys, one a line.", metavar="FILE")
    served_model_name: tuple[str, ...] = option((), "Name in the API, in place of the model's; may be repeated.")
    allowed_origins: tuple[str, ...] = option((), "Origin of web pages elsewhere that may ask (CORS); may be repeated.")
    allowed_methods: tuple[str, ...] = option(("*",), "HTTP method that such pages may use; may be repeated.")
    allowed_headers: tuple[str, ...] = option(("*",), "HTTP header that such pages may send; may be repeated.")
    allow_credentials: bool = option(False, "Let such pages send cookies and the like.")
    ssl_certfile: str | None = option(None, "Certificate (PEM) to speak TLS with; the key may be in it.",
                                      metavar="FILE")
    ssl_keyfile: str | None = option(None, "Key (PEM) of the certificate.", metavar="FILE")
    ssl_keyfile_password: str | None = option(None, "Password of that key.")
    root_path: str = option("", "Path under which a proxy offers the server.", metavar="/PATH")
    max_waiting: int = option(256, "Requests that may wait; more are turned away (429).")
    max_connections: int = option(512, "HTTP requests at once, probes not counted; more are turned away (429).")
    max_choices: int = option(256, "Texts that one request may ask for, prompts times n.")
    max_body_bytes: int = option(4 * 2**20, "Size of a request's body at most.")
    body_timeout: float = option(60.0, "Time that a request's body may take to arrive.", metavar="SECONDS")
    write_timeout: float = option(60.0, "Time that a reader may take nothing before it counts as gone.",
                                  metavar="SECONDS")
    request_timeout: float | None = option(None, "Time after which a request ends with what it has.", metavar="SECONDS")
    shutdown_timeout: int = option(600, "Time that requests still have when the server is told to end; then they are "
                                   "cut off.", metavar="SECONDS")
    tool_call_parser: str = option("auto", "How the model writes calls of tools: hermes (Qwen too), llama3_json, "
                                   "mistral, auto (what its chat template tells), or none: calls only if demanded.")
    reasoning_parser: str = option("none", "How the model's thoughts are told from its answers, by <think> marks: "
                                   "deepseek_r1 (it always thinks), qwen3 (if there is such a mark), or none: they are "
                                   "not.")
    log_level: str = option("info", "How much is logged.")

    def __post_init__(self) -> None:
        for key in self.api_key:
            if not key or any(map(str.isspace, key)):
                raise UsageError("an API key is empty" if not key else "an API key has white space in it",
                                 hint="A key is one word, of FULLPIPE_API_KEY too. Name none at all, and unset the "
                                      "variable, to let everybody in.")
        self._refuse_what_has_no_effect()
        self._check_names()
        _refuse_unless(
            (not self.root_path or (self.root_path.startswith("/") and not self.root_path.endswith("/")),
             f"root_path must begin with / and not end with it (got {self.root_path!r})"),
            (0 <= self.port < 65536, f"the port must be below 65536 (got {self.port})"),
            (self.max_waiting >= 0, f"max_waiting must be 0 or more (got {self.max_waiting})"),
            *((getattr(self, name) >= 1, f"{name} must be 1 or more (got {getattr(self, name)})")
              for name in ("max_connections", "max_choices", "max_body_bytes")),
            *((limit is None or limit > 0, f"{name} must be above 0 (got {limit})")
              for name in ("body_timeout", "write_timeout", "request_timeout") for limit in (getattr(self, name),)),
            (self.shutdown_timeout >= 0, f"shutdown_timeout must be 0 or more (got {self.shutdown_timeout})"),
            (self.tool_call_parser in TOOL_CALL_PARSERS,
             f"unknown tool_call_parser {self.tool_call_parser!r}; known are {', '.join(TOOL_CALL_PARSERS)}"),
            (self.reasoning_parser in REASONING_PARSERS,
             f"unknown reasoning_parser {self.reasoning_parser!r}; known are {', '.join(REASONING_PARSERS)}"),
            (self.log_level in LOG_LEVELS, f"unknown log level {self.log_level!r}; known are {', '.join(LOG_LEVELS)}"))

    def _check_names(self) -> None:
        if not all(name.strip() for name in self.served_model_name):
            raise UsageError("a served model's name is empty", param="served_model_name",
                             hint="Leave `served_model_name` out to use the model's own.")
        for origin in self.allowed_origins:
            if origin not in ("*", "null") and not _ORIGIN.fullmatch(origin):
                raise UsageError(f"{origin[:80]!r} is no origin of a web page", param="allowed_origins",
                                 hint="An origin is http:// or https:// with a host, and a port if it has one, as in "
                                      "https://example.org:8443; * is any.")

    def _refuse_what_has_no_effect(self) -> None:
        for needed, names in (("ssl_certfile", ("ssl_keyfile", "ssl_keyfile_password")),
                              ("allowed_origins", ("allowed_methods", "allowed_headers", "allow_credentials"))):
            for one in fields(self):
                if one.name in names and not getattr(self, needed) and getattr(self, one.name) != one.default:
                    raise UsageError(f"{one.name} has no effect without {needed}", param=one.name,
                                     hint=f"Give `{needed}`, too.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions:
    """How the text of a prompt becomes a prompt."""

    system: str | None = option(None, "System message.")
    use_chat_template: bool = option(True, "Continue the prompt as plain text instead of asking through the model's "
                                     "chat template.", " /--no-chat-template")


T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """All that it takes to have a model answer. The defaults are those of `LLM` and `fullpipe generate`."""

    model: ModelOptions = ModelOptions()
    method: MethodOptions = MethodOptions()
    pipeline: PipelineOptions = PipelineOptions()
    engine: EngineOptions = EngineOptions(max_num_seqs=16)

    @classmethod
    def of(cls, **values: Any) -> Self:
        """The defaults with these options set, whichever part they belong to.

        Raises UsageError for names that do not exist, values of a wrong type, and what cannot be.
        """
        return cls().having(**values)

    def having(self, **values: Any) -> Self:
        """The same with these options set."""
        parts = {part.name: getattr(self, part.name) for part in fields(self)}
        owner = {one.name: name for name, part in parts.items() for one in fields(part)}
        for name in values:
            if name not in owner:
                raise _unknown(name, list(owner))
        return replace(self, **{name: _having(part, {key: values[key] for key in values if owner[key] == name})
                                for name, part in parts.items()})


def _having(part: T, values: dict[str, Any]) -> T:
    """The options with these values, whose types are checked."""
    if not values:
        return part
    whole = {one.name: getattr(part, one.name) for one in fields(part)} | values  # type: ignore[arg-type]
    try:
        return msgspec.convert(whole, type(part))
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, UsageError):
            raise error.__cause__ from None
        what, _, where = str(error).partition(" - at `$.")
        raise UsageError(f"{where.removesuffix('`')}: {what[:1].lower()}{what[1:]}") from None


# What vLLM and llama.cpp call what we have under another name, or in another shape.
_ELSEWHERE = {"pipeline_parallel_size": "stages", "speculative_config": "draft", "num_speculative_tokens": "depth",
              "gpu_memory_utilization": "kv_cache_tokens", "n_ctx": "max_model_len", "n_threads": "threads",
              "load_in_8bit": "quantization", "load_in_4bit": "quantization", "quantize": "quantization",
              "model_path": "model", "n_parallel": "max_num_seqs"}


def _unknown(name: str, known: list[str]) -> UsageError:
    near = [_ELSEWHERE[name]] if name in _ELSEWHERE else difflib.get_close_matches(name, known, n=1)
    return UsageError(f"there is no option {name!r}",
                      hint=f"Did you mean {near[0]}?" if near else f"Known are: {', '.join(sorted(known))}.")


# `fullpipe serve` begins with these: where many ask, two stages with a draft beside them serve best.
SERVING = Options(
    pipeline=PipelineOptions(stages=2, timeout=30.0),
    engine=EngineOptions(max_num_seqs=16, kv_cache_tokens=65536, enable_prefix_caching=True))
