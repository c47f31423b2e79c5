"""Name of the recipe for torchtune's CLI: `tune run align_hybrid --config configs/smollm2_135m_align.yaml`."""

from torchtune_recipes.align_hybrid import main

if __name__ == "__main__":
    main()
