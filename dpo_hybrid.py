"""Name of the recipe for torchtune's CLI: `tune run dpo_hybrid --config configs/8b_dpo.yaml`."""

from torchtune_recipes.dpo_hybrid import main

if __name__ == "__main__":
    main()
