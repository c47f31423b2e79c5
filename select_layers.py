"""Name of the recipe for torchtune's CLI: `tune run select_layers --config configs/8b_select.yaml`."""

from torchtune_recipes.select_layers import main

if __name__ == "__main__":
    main()
