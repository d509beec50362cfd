# make demo    the whole job on this machine: collect, train, export, act (about 5 minutes on 2 cores)
# make test    all tests        make lint    ruff        make setup    the environment        make clean    remove what these made
# make test-sim    install Meta-World (requirements-sim.txt), and run the tests of environments
# make test-gpu    what only a GPU can show
# make chaos   kill a whole training job KILLS times, resume it, compare with one that was not stopped (100: 8 minutes)

PYTHON ?= python3
BIN := .venv/bin
KILLS ?= 100

DEMO_POLICY := --model.width 64 --model.attention_heads 4 --model.mlp_ratio 2 --model.vision_stride 8 --model.vision_blocks 0 \
	--model.language_layers 2 --model.head_layers 2 --model.max_tokens 56 --model.chunk_size 8 --model.n_action_steps 2
DEMO_OPTIM := --global_batch_size 32 --optim.lr 1.5e-3 --optim.muon_lr 0.01 --optim.warmup_steps 100 --optim.weight_decay 1e-4 --optim.ema 0.995
DEMO_HEAD := --model.head regression --model.gripper_dims 2 --model.loss.mse 0.9 --model.loss.l1 0.1

.PHONY: setup demo test test-sim test-gpu chaos lint clean

setup: .venv/ready .venv/ready-dev

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/ready-dev: requirements-dev.txt .venv/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

demo: .venv/ready
	rm -rf data/demo runs/demo
	$(BIN)/python -m vla.collect tabletop --out data/demo --episodes 1600
	$(BIN)/accelerate launch --config_file accelerate_configs/cpu.yaml train.py --data.path data/demo --run_dir runs/demo \
		--steps 3000 $(DEMO_OPTIM) $(DEMO_POLICY) $(DEMO_HEAD) \
		--data.workers 1 --eval.every 1000 --eval.env tabletop --checkpoint.every 1000
	$(BIN)/python -m vla.rollout --policy runs/demo/export --env tabletop --episodes 100 --baselines \
		--out runs/demo/rollout.json --gif runs/demo/rollout.gif
	@echo "results: runs/demo/rollout.json   pictures: runs/demo/rollout.gif"
	@echo "curves:  $(BIN)/tensorboard --logdir runs   then open http://localhost:6006"

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-sim: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-sim.txt
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/sim

test-gpu: setup
	TEST_GPU=1 $(BIN)/python -m pytest tests/model/test_gpu.py

chaos: setup
	OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= $(BIN)/python tests/chaos.py --kills $(KILLS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv data/demo runs/demo runs/chaos .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
