# make demo: see it work.  make test: what CI runs.  Each target makes .venv and installs what it needs when missing.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo demo-dpo demo-cls demo-grpo test test-compat soak lint setup clean

demo: .venv/run.done
	$(BIN)/python tools/make_demo.py --output_dir demo
	$(BIN)/accelerate launch --config_file accelerate_configs/cpu.yaml train_sft.py \
	    --model_id demo/model --data_path demo/sft_train.json --eval_path demo/sft_eval.json --image_folder demo/videos \
	    --video_resized_width 64 --video_resized_height 64 --nframes 4 --num_train_epochs 2 \
	    --per_device_train_batch_size 8 --learning_rate 3e-3 --lr_scheduler_type cosine --warmup_ratio 0.05 \
	    --dataloader_num_workers 2 --save_strategy no --output_dir demo/out
	$(BIN)/python tools/show_demo.py demo

demo-dpo: .venv/run.done
	$(BIN)/python tools/make_demo.py --output_dir demo
	$(BIN)/accelerate launch --config_file accelerate_configs/cpu.yaml train_dpo.py \
	    --model_id demo/model --data_path demo/dpo_train.json --eval_path demo/dpo_eval.json --image_folder demo/videos \
	    --video_resized_width 64 --video_resized_height 64 --nframes 4 --num_train_epochs 2 \
	    --per_device_train_batch_size 8 --learning_rate 3e-3 --lr_scheduler_type cosine --warmup_ratio 0.05 \
	    --dataloader_num_workers 2 --save_strategy no --output_dir demo/out_dpo
	$(BIN)/python tools/show_demo.py demo --pairs

demo-cls: .venv/run.done
	$(BIN)/python tools/make_demo.py --output_dir demo
	$(BIN)/accelerate launch --config_file accelerate_configs/cpu.yaml train_cls.py \
	    --model_id demo/model --data_path demo/cls_train.json --eval_path demo/cls_eval.json --image_folder demo/videos \
	    --video_resized_width 64 --video_resized_height 64 --nframes 4 --num_train_epochs 2 \
	    --per_device_train_batch_size 8 --learning_rate 3e-3 --lr_scheduler_type cosine --warmup_ratio 0.05 \
	    --dataloader_num_workers 2 --save_strategy no --output_dir demo/out_cls
	$(BIN)/python tools/plot_metrics.py demo/out_cls

demo-grpo: .venv/run.done
	$(BIN)/python tools/make_demo.py --output_dir demo
	$(BIN)/accelerate launch --config_file accelerate_configs/cpu.yaml train_sft.py \
	    --model_id demo/model --data_path demo/sft_train.json --image_folder demo/videos \
	    --video_resized_width 64 --video_resized_height 64 --nframes 4 --max_steps 40 \
	    --per_device_train_batch_size 8 --learning_rate 3e-3 --lr_scheduler_type cosine --warmup_ratio 0.05 \
	    --dataloader_num_workers 2 --save_strategy no --output_dir demo/half
	$(BIN)/accelerate launch --config_file accelerate_configs/cpu.yaml train_grpo.py \
	    --model_id demo/half --data_path demo/sft_train.json --eval_path demo/sft_eval.json --image_folder demo/videos \
	    --video_resized_width 64 --video_resized_height 64 --nframes 4 --max_steps 96 \
	    --reward_funcs accuracy --num_generations 8 --max_completion_length 12 --temperature 1 --top_k 0 --beta 0.1 \
	    --per_device_train_batch_size 8 --per_device_eval_batch_size 20 --learning_rate 5e-4 \
	    --lr_scheduler_type constant_with_warmup --warmup_steps 3 --eval_strategy steps --eval_steps 24 \
	    --dataloader_num_workers 2 --save_strategy no --output_dir demo/out_grpo
	$(BIN)/python tools/show_demo.py demo --before half --after out_grpo

test: .venv/dev.done lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# outputs load in transformers 4.57 too: written in .venv, read in an environment of its own
test-compat: .venv/dev.done .venv-compat/done
	rm -rf .compat
	OMP_NUM_THREADS=1 $(BIN)/python tests/compat.py write .compat
	OMP_NUM_THREADS=1 .venv-compat/bin/python tests/compat.py read .compat

soak: .venv/dev.done
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak.py

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
