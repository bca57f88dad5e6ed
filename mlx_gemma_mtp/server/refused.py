"""Flags of vLLM and mlx-lm that people bring and that mean nothing here, and why."""

from __future__ import annotations

_REASONS = {
    "one machine serves the whole model": """
        --pipeline --tensor-parallel-size -tp --pipeline-parallel-size -pp
        --data-parallel-size -dp --data-parallel-rank -dpn --data-parallel-start-rank
        -dpr --data-parallel-size-local -dpl --data-parallel-address -dpa
        --data-parallel-rpc-port -dpp --data-parallel-backend -dpb
        --data-parallel-hybrid-lb -dph --data-parallel-external-lb -dpe
        --data-parallel-multi-port-external-lb -dpm --data-parallel-supervisor-port
        --dp-supervisor-probe-failure-threshold --dp-supervisor-probe-interval-s
        --dp-supervisor-probe-timeout-s --dp-sync-interval
        --decode-context-parallel-size -dcp --dcp-comm-backend --dcp-q-replicate
        --dcp-kv-cache-interleave-size --cp-kv-cache-interleave-size
        --prefill-context-parallel-size -pcp --disable-nccl-for-dp-synchronization
        --distributed-executor-backend --distributed-timeout-seconds
        --cpu-distributed-timeout-seconds --master-addr --master-port --nnodes -n
        --node-rank -r --device-ids --numa-bind --numa-bind-nodes --numa-bind-cpus
        --ray-workers-use-nsight --max-parallel-loading-workers
        --disable-custom-all-reduce --enable-nccl-comm-suspend --enable-elastic-ep
        --elastic-ep-max-dp-size --enable-dbo --dbo-decode-token-threshold
        --dbo-prefill-token-threshold --ubatch-size --enable-shm-tensor-arena
        --enable-hc-sp --enable-batch-sharded-sampling --enable-fault-tolerance
        --fault-tolerance-config --kv-transfer-config --kv-events-config
        --ec-transfer-config --ec-manager-config --weight-transfer-config --headless
        --api-server-count -asc --enable-scale-out --tokens-only
        --worker-cls --worker-extension-cls""",
    "rounds always overlap": "--async-scheduling",
    "MLX places a mixture's experts": """
        --enable-expert-parallel -ep --enable-ep-weight-filter --all2all-backend
        --enable-eplb --eplb-config --expert-placement-strategy --moe-backend
        --enable-return-routed-experts""",
    "--max-kv-bytes states the memory of running requests": """
        --gpu-memory-utilization --device-memory-utilization --num-gpu-blocks-override
        --swap-space --watermark""",
    "it is --max-kv-bytes here": "--kv-cache-memory-bytes",
    "memory is shared by all of a Mac's processors": """
        --cpu-offload-gb --cpu-offload-params --kv-offloading-size
        --kv-offloading-backend --offload-backend --offload-group-size
        --offload-num-in-group --offload-prefetch-step --offload-params
        --enable-sleep-mode --sleep-mode-backend --sleep-mode-offload-cudagraph
        --sleep-preserve-parameter-names --enable-cumem-allocator""",
    "weights keep the type of the checkpoint; mlx_gemma_mtp.convert has it": "--dtype",
    "the checkpoint says how it is quantized": """
        --quantization -q --quantization-config --allow-deprecated-quantization""",
    "checkpoints are safetensors": """
        --load-format --model-loader-extra-config --ignore-patterns
        --pt-load-map-location --use-tqdm-on-load --safetensors-load-strategy
        --safetensors-prefetch-num-threads --safetensors-prefetch-block-size""",
    "the tokenizer comes with the checkpoint": """
        --tokenizer --tokenizer-mode --tokenizer-revision --skip-tokenizer-init
        --renderer-num-workers""",
    "--revision names that of the whole checkpoint": "--code-revision",
    "HF_HOME says where the Hub's files are kept": "--download-dir",
    "HF_TOKEN has the Hub's token": "--hf-token",
    "the checkpoint's configuration counts": """
        --hf-config-path --hf-overrides --config-format --model-impl
        --model-class-overrides --runner --convert --task --pooler-config
        --override-pooler-config --rope-scaling --rope-theta
        --disable-sliding-window --logits-processors --logits-processor-pattern
        --io-processor-plugin --override-attention-dtype""",
    "generation_config.json counts, after --temp, --top-p, --top-k, --min-p": """
        --generation-config --override-generation-config""",
    "requests have a seed": "--seed",
    "rounds are always compiled": """
        --enforce-eager --compilation-config -cc --optimization-level -O
        --cudagraph-capture-sizes --max-cudagraph-capture-size --max-seq-len-to-capture
        --cudagraph-metrics --performance-mode --jit-monitor-mode
        --jit-monitor-verbose""",
    "MLX chooses the kernels": """
        --attention-backend --attention-config -ac --linear-backend --kernel-config
        --disable-cascade-attn --ir-op-priority --enable-flashinfer-autotune
        --monokernel --sparse-indexer-topk-backend --use-fp64-gumbel --engram-config
        --mamba-backend --mamba-ssu-algorithm --mamba-cache-dtype
        --mamba-ssm-cache-dtype --mamba-block-size --mamba-cache-mode
        --enable-mamba-cache-stochastic-rounding --mamba-cache-philox-rounds
        --enable-mamba-shared-prefix-checkpoint --replayssm-buffer-len --use-replayssm
        --gdn-prefill-backend --kda-prefill-backend --kda-decode-backend
        --enable-flash-late-interaction --device""",
    "mlx-lm has no quantized cache for Gemma 4": """
        --kv-bits --kv-group-size --quantized-kv-start --kv-cache-dtype
        --kv-cache-dtype-skip-layers --calculate-kv-scales""",
    "caches are no blocks": """
        --block-size --prefix-match-unit --prefix-caching-hash-algo
        --prefix-cache-retention-interval --disable-hybrid-kv-cache-manager
        --kv-sharing-fast-prefill --swa-bounded-replay --num-lookahead-slots""",
    "caches are kept; --prompt-cache-size says how many": "--enable-prefix-caching",
    "--prompt-cache-size 0 keeps no caches": "--no-enable-prefix-caching",
    "prompts are always read in chunks": """
        --enable-chunked-prefill --max-num-partial-prefills
        --max-long-partial-prefills --long-prefill-token-threshold
        --long-prefill-token-threshold-adaptive --disable-chunked-mm-input""",
    "prompts are read one chunk at a time between rounds": """
        --prompt-concurrency --prefill-schedule-interval""",
    "it is --prefill-step-size here": "--max-num-scheduled-tokens",
    "it is --max-rows here": "--max-num-active-seqs",
    "it is --max-waiting here": "--max-num-queued-reqs",
    "--max-waiting counts requests": "--max-num-queued-tokens",
    "requests take turns": """
        --scheduling-policy --scheduler-cls --scheduler-reserve-full-isl
        --preemption-mode --num-scheduler-steps --scheduler-delay-factor""",
    "it is --speculative-config here": "-sc",
    "only text is served": """
        --limit-mm-per-prompt --enable-mm-embeds --media-io-kwargs
        --mm-processor-kwargs --mm-processor-cache-gb --mm-processor-cache-type
        --mm-hasher-algorithm --mm-shm-cache-max-object-size-mb --mm-encoder-only
        --mm-encoder-tp-mode --mm-encoder-attn-backend --mm-encoder-attn-dtype
        --mm-encoder-fp8-scale-path --mm-encoder-fp8-scale-save-path
        --mm-encoder-fp8-scale-save-margin --interleave-mm-strings --skip-mm-profiling
        --video-pruning-rate --video-pruning-method --mm-tensor-ipc
        --mm-processor-device --mm-ipc-gpu-memory-gb --mm-device-do-normalize
        --allowed-local-media-path --allowed-media-domains --trust-request-mm-kwargs
        --language-model-only --disable-mm-preprocessor-cache""",
    "prompts are text or token ids": "--enable-prompt-embeds",
    "--adapter-path names LoRA adapters": """
        --enable-lora --lora-modules --max-loras --max-lora-rank --lora-dtype
        --max-cpu-loras --fully-sharded-loras --lora-target-modules --default-mm-loras
        --enable-tower-connector-lora --specialize-active-lora
        --enable-mixed-moe-lora-format --enable-moe-shared-loras
        --max-lora-cls-labels --lora-extra-vocab-size --enable-prompt-adapter""",
    "the tokenizer's vocabulary says how reasoning is marked": """
        --reasoning-parser --reasoning-parser-plugin --reasoning-config
        --enable-reasoning""",
    "the chat template says how tools are called": """
        --tool-call-parser --tool-parser-plugin --tool-strict-level""",
    "tools are on where the chat template has them": """
        --enable-auto-tool-choice --exclude-tools-when-tool-choice-none""",
    "clients call the tools": "--tool-server",
    "llguidance makes answers of a given form, as requests ask for it": """
        --structured-outputs-config --guided-decoding-backend
        --guided-decoding-disable-fallback --guided-decoding-disable-any-whitespace
        --guided-decoding-disable-additional-properties""",
    "--chat-template names one": "--use-default-chat-template",
    "templates of requests could run for ever": "--trust-request-chat-template",
    "templates are given text": "--chat-template-content-format",
    "answers are the assistant's": "--response-role",
    "the chat template decides what it takes": """
        --reasoning-effort-map --anthropic-disabled-thinking-effort --cohere-format
        --cohere-is-reasoning-model""",
    "log-probabilities are those of the model, tokens are texts": """
        --logprobs-mode --return-tokens-as-token-ids --return-sampling-mask""",
    "there is no encryption: put a proxy in front": """
        --ssl-keyfile --ssl-certfile --ssl-ca-certs --ssl-cert-reqs --ssl-ciphers
        --enable-ssl-refresh""",
    "requests come to --host and --port": "--uds --grpc --grpc-port --root-path",
    "pages elsewhere may send what this server takes, without cookies": """
        --allow-credentials --allowed-methods --allowed-headers""",
    "nothing stands between requests and the server": "--middleware",
    "heads have a limit of their own": """
        --h11-max-incomplete-event-size --h11-max-header-count""",
    "every answer has x-request-id": "--enable-request-id-headers",
    "/openapi.json is always there, pages that load scripts never": """
        --disable-fastapi-docs --enable-offline-docs""",
    "--log-level says how much is logged; texts never are": """
        --enable-log-requests --disable-log-requests --enable-log-outputs
        --enable-log-deltas --max-log-len --disable-log-stats
        --aggregate-engine-logging --disable-uvicorn-access-log
        --disable-access-log-for-endpoints --log-error-stack --log-config-file
        --logging-config --enable-logging-iteration-details""",
    "/metrics and /stats count everything": """
        --enable-server-load-tracking --enable-per-request-metrics
        --per-request-spec-decode-metrics --kv-cache-metrics --kv-cache-metrics-sample
        --show-hidden-metrics-for-version --custom-histogram-buckets
        --enable-mfu-metrics --otlp-traces-endpoint --collect-detailed-traces
        --enable-trace-replay --enable-layerwise-nvtx-tracing --profiler-config
        --watchdog-config""",
    "answers always say it": "--enable-prompt-tokens-details",
    "requests ask for it by stream_options": "--enable-force-include-usage",
    "streams are always kept alive, and sent as they come": """
        --sse-keep-alive-interval --stream-interval""",
    "the tokenizer is in the checkpoint for all to read": """
        --enable-tokenizer-info-endpoint""",
    "the fingerprint names the package and its version": """
        --fingerprint-mode --fingerprint-value""",
    "settings are flags": "--config --additional-config --fail-on-environ-validation",
    "texts have no watermark": "--watermark-config",
    "Gemma 4 is none of these models": "--diffusion-config -dc --aux-output-config",
}
REFUSED = {flag: why for why, flags in _REASONS.items() for flag in flags.split()}


def reason_against(flag: str) -> str | None:
    """Why a flag is not taken; None for one that is not known.

    Args:
        flag: As it was given; vLLM also takes underscores, ``--no-x`` and
            ``--disable-x`` for switches, ``--x.key`` for JSON objects, and ``-O3``.
    """
    if not flag.startswith("-"):
        return "one model is served"
    name = flag.split(".")[0].replace("_", "-")
    spellings = (
        name,
        name.replace("--no-", "--", 1),
        name.replace("--disable-", "--enable-", 1),
        "-O" if name.startswith("-O") else name,
    )
    return next((REFUSED[each] for each in spellings if each in REFUSED), None)
