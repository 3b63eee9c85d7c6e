#!/bin/sh
# Load `offramp serve tiny-opt` at port 8000 by a benchmark, with synthetic images:
# deploy/bench.sh guidellm|vllm BACKBONE, where BACKBONE is a folder with the tokenizer.
set -eu
tool=${1:?guidellm or vllm} backbone=${2:?the folder of the backbone}
case $tool in
guidellm)
    exec guidellm run --backend kind=openai_http,target=http://localhost:8000 \
        --profile kind=concurrent,streams=4 --constraint kind=max_requests,count=24 \
        --tokenizer "kind=hf_auto,model=$backbone" \
        --data kind=synthetic_text,prompt_tokens=8,output_tokens=16 \
        --data kind=synthetic_image,width=72,height=72 ;;
vllm)
    exec vllm bench serve --backend openai-chat --base-url http://localhost:8000 \
        --endpoint /v1/chat/completions --model tiny-opt --tokenizer "$backbone" \
        --dataset-name random-mm --num-prompts 16 --random-input-len 8 --random-output-len 16 \
        --random-mm-base-items-per-request 1 \
        --random-mm-bucket-config '{(72, 72, 1): 1.0}' \
        --random-mm-limit-mm-per-prompt '{"image": 1, "video": 0}' \
        --max-concurrency 4 --ignore-eos ;;
*)
    echo "guidellm or vllm, not $tool" >&2
    exit 2 ;;
esac
