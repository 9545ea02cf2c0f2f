# make demo: see it work.  make test: what CI runs.  Each target makes .venv and installs what it needs when missing.
# Interrupted, a demo resumes with the same command. FLAGS="--num_train_epochs 4" are handed to its trainer.
PYTHON ?= python3
BIN := .venv/bin
# Tiny models: a second thread costs more than it brings.
export OMP_NUM_THREADS ?= 1

.PHONY: demo demo-dpo demo-cls demo-grpo test test-compat soak lint setup clean

LAUNCH := $(BIN)/accelerate launch --config_file accelerate_configs/cpu.yaml
DEMO := --image_folder demo/videos --video_resized_width 64 --video_resized_height 64 --nframes 4 \
    --num_train_epochs 2 --per_device_train_batch_size 8 --dataloader_num_workers 2 --save_strategy no \
    --resume_from_checkpoint auto
FAST := --learning_rate 3e-3 --lr_scheduler_type cosine --warmup_ratio 0.05

demo: demo/demo.json
	$(LAUNCH) train_sft.py --model_id demo/model --data_path demo/sft_train.json --eval_path demo/sft_eval.json \
	    $(DEMO) $(FAST) --output_dir demo/out $(FLAGS)
	$(BIN)/python tools/show_demo.py demo --objective sft

demo-dpo: demo/demo.json
	$(LAUNCH) train_dpo.py --model_id demo/model --data_path demo/dpo_train.json --eval_path demo/dpo_eval.json \
	    $(DEMO) $(FAST) --num_train_epochs 3 --output_dir demo/out_dpo $(FLAGS)
	$(BIN)/python tools/show_demo.py demo --objective dpo

demo-cls: demo/demo.json
	$(LAUNCH) train_cls.py --model_id demo/model --data_path demo/cls_train.json --eval_path demo/cls_eval.json \
	    $(DEMO) $(FAST) --num_train_epochs 3 --output_dir demo/out_cls $(FLAGS)
	$(BIN)/python tools/show_demo.py demo --objective cls

demo-grpo: demo/demo.json  # from a model that is right half of the time
	$(LAUNCH) train_sft.py --model_id demo/model --data_path demo/sft_train.json $(DEMO) $(FAST) --max_steps 40 \
	    --output_dir demo/half
	$(LAUNCH) train_grpo.py --model_id demo/half --data_path demo/sft_train.json --eval_path demo/sft_eval.json \
	    $(DEMO) --max_steps 96 --reward_funcs accuracy --num_generations 8 --max_completion_length 12 \
	    --temperature 1 --top_k 0 --beta 0.1 --per_device_eval_batch_size 20 --learning_rate 5e-4 \
	    --lr_scheduler_type constant_with_warmup --warmup_steps 3 --eval_strategy steps --eval_steps 24 \
	    --output_dir demo/out_grpo $(FLAGS)
	$(BIN)/python tools/show_demo.py demo --objective grpo

.PHONY: demo/demo.json  # the script itself knows whether what is there is complete
demo/demo.json: .venv/run.done
	$(BIN)/python tools/make_demo.py --output_dir demo

test: .venv/dev.done lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# outputs load in transformers 4.57 too: written in .venv, read in an environment of its own
test-compat: .venv/dev.done .venv-compat/done
	rm -rf .compat
	OMP_NUM_THREADS=1 $(BIN)/python tests/compat.py write .compat
	OMP_NUM_THREADS=1 .venv-compat/bin/python tests/compat.py read .compat

soak: .venv/dev.done
	$(BIN)/python tests/soak.py

lint: .venv/dev.done
	$(BIN)/ruff check . && $(BIN)/ruff format --check --quiet .

setup: .venv/dev.done

.venv/run.done: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

.venv/dev.done: .venv/run.done requirements-dev.txt
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

.venv-compat/done: Makefile
	test -x .venv-compat/bin/python || $(PYTHON) -m venv .venv-compat
	.venv-compat/bin/python -m pip install --quiet torch==2.14.1 torchvision==0.29.1 transformers==4.57.6 peft==0.17.1 jinja2
	touch $@

clean:
	rm -rf .venv .venv-compat .compat demo
