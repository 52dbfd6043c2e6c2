"""ShopWorld: a seeded simulator of a shop, its customers and their support chats."""
