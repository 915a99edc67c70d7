"""`python -m llmcompress`, as `accelerate launch -m llmcompress` starts it."""

from llmcompress.cli.app import main

if __name__ == "__main__":
    main()
