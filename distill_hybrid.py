"""Name of the recipe for torchtune's CLI: `tune run distill_hybrid --config configs/8b.yaml`."""

from torchtune_recipes.distill_hybrid import main

if __name__ == "__main__":
    main()
