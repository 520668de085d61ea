"""Text, tokenizers, tasks and chats on their way into packed batches."""
