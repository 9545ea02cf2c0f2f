"""Command lines that users bring from 2U1/Qwen2-VL-Finetune and from its fork, as plain data.

Source: scripts/finetune*.sh and src/params.py of 2U1/Qwen2-VL-Finetune at commit 6695161adfbd. Each command is the
argv after the launcher and the script, in the order of the script, with its own shell variables and arithmetic
expanded. The seed_* entries are the flags in the README of the fork.
"""

from shlex import split

SFT_COMMANDS = {
    "finetune.sh": split("""
        --use_liger True --deepspeed scripts/zero3_offload.json --model_id Qwen/Qwen2.5-VL-3B-Instruct
        --data_path /path/to/your/training/data.json --image_folder /path/to/your/image/folder
        --remove_unused_columns False --freeze_vision_tower False --freeze_llm False --freeze_merger False --bf16 True
        --fp16 False --disable_flash_attn2 False --output_dir output/test_fft --num_train_epochs 1
        --per_device_train_batch_size 4 --gradient_accumulation_steps 4 --image_min_pixels 401408
        --image_max_pixels 1003520 --learning_rate 1e-5 --merger_lr 1e-5 --vision_lr 2e-6 --weight_decay 0.1
        --warmup_ratio 0.03 --lr_scheduler_type cosine --logging_steps 1 --tf32 True --gradient_checkpointing True
        --report_to tensorboard --lazy_preprocess True --save_strategy steps --save_steps 200 --save_total_limit 10
        --dataloader_num_workers 4
    """),
    "finetune_lora.sh": split("""
        --use_liger True --lora_enable True --use_dora False --lora_namespan_exclude "['lm_head', 'embed_tokens']"
        --lora_rank 64 --lora_alpha 64 --lora_dropout 0.05 --num_lora_modules -1 --deepspeed scripts/zero3_offload.json
        --model_id Qwen/Qwen2.5-VL-3B-Instruct --data_path /path/to/your/training/data.json
        --image_folder /path/to/your/image/folder --remove_unused_columns False --freeze_vision_tower False
        --freeze_llm True --freeze_merger False --bf16 True --fp16 False --disable_flash_attn2 False
        --output_dir output/testing_lora --num_train_epochs 1 --per_device_train_batch_size 4
        --gradient_accumulation_steps 4 --image_min_pixels 200704 --image_max_pixels 1003520 --learning_rate 1e-4
        --merger_lr 1e-5 --vision_lr 2e-6 --weight_decay 0.1 --warmup_ratio 0.03 --lr_scheduler_type cosine
        --logging_steps 1 --tf32 True --gradient_checkpointing True --report_to tensorboard --lazy_preprocess True
        --save_strategy steps --save_steps 200 --save_total_limit 10 --dataloader_num_workers 4
    """),
    "finetune_lora_vision.sh": split("""
        --use_liger True --lora_enable True --vision_lora True --use_dora False
        --lora_namespan_exclude "['lm_head', 'embed_tokens']" --lora_rank 64 --lora_alpha 64 --lora_dropout 0.05
        --num_lora_modules -1 --deepspeed scripts/zero3.json --model_id Qwen/Qwen2.5-VL-3B-Instruct
        --data_path /path/to/your/training/data.json --image_folder /path/to/your/image/folder
        --remove_unused_columns False --freeze_vision_tower True --freeze_llm True --freeze_merger True --bf16 True
        --fp16 False --disable_flash_attn2 False --output_dir output/lora_vision_test --num_train_epochs 1
        --per_device_train_batch_size 4 --gradient_accumulation_steps 4 --image_min_pixels 200704
        --image_max_pixels 1003520 --learning_rate 2e-4 --weight_decay 0.1 --warmup_ratio 0.03
        --lr_scheduler_type cosine --logging_steps 1 --tf32 True --gradient_checkpointing True --report_to tensorboard
        --lazy_preprocess True --save_strategy steps --save_steps 200 --save_total_limit 10 --dataloader_num_workers 4
    """),
    "finetune_video.sh": split("""
        --use_liger True --deepspeed scripts/zero3_offload.json --model_id Qwen/Qwen2.5-VL-3B-Instruct
        --data_path /path/to/your/training/data.json --image_folder /path/to/your/image/folder
        --remove_unused_columns False --freeze_vision_tower False --freeze_llm False --freeze_merger False --bf16 True
        --fp16 False --disable_flash_attn2 False --output_dir output/test_train --num_train_epochs 1
        --per_device_train_batch_size 4 --gradient_accumulation_steps 4 --video_max_pixels 151200 --fps 1.0
        --learning_rate 1e-5 --merger_lr 1e-5 --vision_lr 2e-6 --weight_decay 0.1 --warmup_ratio 0.03
        --lr_scheduler_type cosine --logging_steps 1 --tf32 True --gradient_checkpointing True --report_to tensorboard
        --lazy_preprocess True --save_strategy steps --save_steps 1 --save_total_limit 10 --dataloader_num_workers 4
    """),
    "seed_8xh100": split("""
        --data_path /path/to/your/multivideo/data.json --image_folder /path/to/your/video/folder
        --video_max_pixels 4096 --video_resized_width 64 --video_resized_height 64 --fps 0.25
        --per_device_train_batch_size 1 --gradient_accumulation_steps 2 --bf16 True
        --deepspeed scripts/zero3_offload.json
    """),
    "seed_4xa100": split("""
        --data_path /path/to/your/multivideo/data.json --image_folder /path/to/your/video/folder
        --video_max_pixels 2304 --video_resized_width 48 --video_resized_height 48 --fps 0.2
        --per_device_train_batch_size 1 --gradient_accumulation_steps 4 --bf16 True
        --deepspeed scripts/zero3_offload.json
    """),
    "seed_out_of_memory": split("""
        --data_path /path/to/your/multivideo/data.json --image_folder /path/to/your/video/folder
        --video_resized_width 48 --video_resized_height 48 --fps 0.15 --bf16 True
        --deepspeed scripts/zero3_offload.json
    """),
}

DPO_COMMANDS = {
    "finetune_dpo.sh": split("""
        --dpo_loss sigmoid --precompute_ref_log_probs False --beta 0.1 --use_liger True
        --deepspeed scripts/zero3_offload.json --model_id Qwen/Qwen2.5-VL-3B-Instruct
        --data_path /path/to/your/training/data.json --image_folder /path/to/your/image/folder
        --remove_unused_columns False --freeze_vision_tower False --freeze_llm False --freeze_merger False --bf16 True
        --fp16 False --disable_flash_attn2 False --output_dir output/test_dpo --num_train_epochs 1
        --per_device_train_batch_size 4 --gradient_accumulation_steps 4 --image_min_pixels 401408
        --image_max_pixels 1003520 --learning_rate 1e-5 --merger_lr 1e-5 --vision_lr 2e-6 --weight_decay 0.1
        --warmup_ratio 0.03 --lr_scheduler_type cosine --logging_steps 1 --tf32 True --gradient_checkpointing True
        --report_to tensorboard --lazy_preprocess True --save_strategy steps --save_steps 200 --save_total_limit 10
        --dataloader_num_workers 4
    """),
}

GRPO_COMMANDS = {
    "finetune_grpo.sh": split("""
        --deepspeed scripts/zero3.json --model_id Qwen/Qwen2.5-VL-3B-Instruct
        --data_path /path/to/your/training/data.json --image_folder /path/to/your/image/folder
        --freeze_vision_tower False --freeze_llm True --freeze_merger False --bf16 True --fp16 False
        --disable_flash_attn2 False --output_dir output/test_grpo --num_train_epochs 1 --num_generations 2
        --per_device_train_batch_size 1 --gradient_accumulation_steps 1 --max_completion_length 256
        --max_prompt_length 512 --image_min_pixels 100352 --image_max_pixels 200704 --learning_rate 5e-6
        --remove_unused_columns False --weight_decay 0.1 --warmup_ratio 0.03 --lr_scheduler_type cosine
        --logging_steps 1 --tf32 True --gradient_checkpointing True --report_to tensorboard --lazy_preprocess True
        --save_strategy epoch --save_total_limit 10 --dataloader_num_workers 4
    """),
}

CLS_COMMANDS = {
    "finetune_cls.sh": split("""
        --deepspeed scripts/zero3.json --model_id Qwen/Qwen2.5-VL-3B-Instruct
        --data_path /path/to/your/training/data.json --image_folder /path/to/your/image/folder
        --eval_path /path/to/your/training/data.json --eval_image_folder /path/to/your/image/folder --freeze_llm True
        --freeze_vision_tower False --freeze_merger False --bf16 True --fp16 False --loss_type cross_entropy
        --num_labels 2 --disable_flash_attn2 False --output_dir output/qwen_cls --num_train_epochs 3
        --per_device_train_batch_size 4 --gradient_accumulation_steps 4 --learning_rate 3e-5 --head_lr 4e-5
        --vision_lr 6e-6 --merger_lr 2e-5 --weight_decay 0.02 --warmup_ratio 0.05 --max_grad_norm 1.0
        --lr_scheduler_type cosine --logging_steps 1 --tf32 True --eval_strategy epoch --load_best_model_at_end True
        --metric_for_best_model eval_f1 --greater_is_better True --gradient_checkpointing True --report_to tensorboard
        --lazy_preprocess True --save_strategy epoch --dataloader_num_workers 4
    """),
}

# Every field of upstream's ModelArguments, DataArguments and the objective's own arguments class, and those inherited
# from transformers or TRL which that objective's scripts pass. --fps is Optional[int] there.
ACCEPTED_FIELDS = {
    "sft": split("""
        adam_beta1 adam_beta2 adam_epsilon bf16 bits cache_dir data_path dataloader_num_workers deepspeed
        disable_flash_attn2 double_quant eval_image_folder eval_path fp16 fps freeze_llm freeze_merger
        freeze_vision_tower gradient_accumulation_steps gradient_checkpointing image_folder image_max_pixels
        image_min_pixels image_resized_height image_resized_width lazy_preprocess learning_rate logging_steps
        lora_alpha lora_bias lora_dropout lora_enable lora_namespan_exclude lora_rank lora_weight_path
        lr_scheduler_type max_seq_length merger_lr model_id nframes num_lora_modules num_train_epochs optim output_dir
        per_device_train_batch_size quant_type remove_unused_columns report_to save_steps save_strategy
        save_total_limit tf32 unfreeze_topk_llm unfreeze_topk_vision use_dora use_liger video_max_pixels
        video_min_pixels video_resized_height video_resized_width vision_lora vision_lr warmup_ratio weight_decay
    """),
    "dpo": split("""
        adam_beta1 adam_beta2 adam_epsilon beta bf16 bits cache_dir data_path dataloader_num_workers deepspeed
        disable_flash_attn2 double_quant dpo_loss eval_image_folder eval_path fp16 fps freeze_llm freeze_merger
        freeze_vision_tower gradient_accumulation_steps gradient_checkpointing image_folder image_max_pixels
        image_min_pixels image_resized_height image_resized_width lazy_preprocess learning_rate logging_steps
        lora_alpha lora_bias lora_dropout lora_enable lora_namespan_exclude lora_rank lora_weight_path
        lr_scheduler_type max_seq_length merger_lr model_id nframes num_lora_modules num_train_epochs optim output_dir
        per_device_train_batch_size precompute_ref_log_probs quant_type remove_unused_columns report_to save_steps
        save_strategy save_total_limit tf32 unfreeze_topk_llm unfreeze_topk_vision use_dora use_liger video_max_pixels
        video_min_pixels video_resized_height video_resized_width vision_lora vision_lr warmup_ratio weight_decay
    """),
    "grpo": split("""
        adam_beta1 adam_beta2 adam_epsilon beta bf16 bits cache_dir data_path dataloader_num_workers deepspeed
        disable_flash_attn2 double_quant eval_image_folder eval_path fp16 fps freeze_llm freeze_merger
        freeze_vision_tower gradient_accumulation_steps gradient_checkpointing image_folder image_max_pixels
        image_min_pixels image_resized_height image_resized_width lazy_preprocess learning_rate logging_steps
        lora_alpha lora_bias lora_dropout lora_enable lora_namespan_exclude lora_rank lora_weight_path
        lr_scheduler_type max_completion_length max_prompt_length merger_lr min_p model_id nframes num_generations
        num_lora_modules num_train_epochs optim output_dir per_device_train_batch_size quant_type remove_unused_columns
        repetition_penalty report_to save_strategy save_total_limit temperature tf32 top_k top_p unfreeze_topk_llm
        unfreeze_topk_vision use_dora video_max_pixels video_min_pixels video_resized_height video_resized_width
        vision_lora vision_lr warmup_ratio weight_decay
    """),
    "cls": split("""
        adam_beta1 adam_beta2 adam_epsilon bf16 bits cache_dir class_balanced_beta data_path dataloader_num_workers
        deepspeed disable_flash_attn2 double_quant early_stopping_patience early_stopping_threshold eval_image_folder
        eval_path eval_strategy focal_alpha focal_gamma fp16 fps freeze_llm freeze_merger freeze_vision_tower
        gradient_accumulation_steps gradient_checkpointing greater_is_better head_lr image_folder image_max_pixels
        image_min_pixels image_resized_height image_resized_width lazy_preprocess learning_rate load_best_model_at_end
        logging_steps lora_alpha lora_bias lora_dropout lora_enable lora_namespan_exclude lora_rank lora_weight_path
        loss_type lr_scheduler_type max_grad_norm max_seq_length merger_lr metric_for_best_model mlp_head_dim
        mlp_head_dropout model_id nframes num_labels num_lora_modules num_train_epochs optim output_dir
        per_device_train_batch_size quant_type report_to save_strategy tf32 unfreeze_topk_llm unfreeze_topk_vision
        use_dora use_liger video_max_pixels video_min_pixels video_resized_height video_resized_width vision_lora
        vision_lr warmup_ratio weight_decay
    """),
}
