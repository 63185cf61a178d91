//! The pool of key/value blocks: who holds which block, and which full blocks can be found again by their
//! tokens.
//!
//! A block is `block_tokens` consecutive positions of one sequence in the model's paged cache. This file
//! knows only numbers: the memory belongs to the model. A block is in one of three states:
//!
//! - *held* by one sequence, which may still write into it;
//! - *held and findable*: it is full, its tokens are registered, any number of sequences may hold it and
//!   nobody writes into it;
//! - *free*: nobody holds it. If it is still findable it waits at the back of the free list for a sequence
//!   that begins with the same tokens, until it is the least recently released and its memory is needed.
//!
//! What a block's keys and values are depends on every token before them. So a block is registered under
//! (parent, its own tokens), where the parent is the *content number* of the block before it, or the root
//! of the sequence. A content number is given once and never again, and the tokens are compared on every
//! look-up: two different prefixes can never be taken for one another, however unlucky a hash is. (A 128-bit
//! hash of the prefix would do as well by probability; comparing 16 numbers is as cheap and leaves nothing to
//! argue about, not even with a client that crafts prompts to read another client's cache.)

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};

/// End of the free list.
const NONE: u32 = u32::MAX;

/// A block of the paged key/value cache: an index into the memory that the model owns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockId(pub u32);

/// What a sequence's keys and values depend on besides its tokens: 0 for a base model; for a reward model a
/// hash of the adapter's generation and the bits of the preference. Sequences share blocks only under the
/// same root.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct CacheRoot(pub u64);

/// A registered content. Numbers are never used twice, so a number stands for one whole prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct ContentId(u64);

/// Everything that stands before a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Parent {
    Root(CacheRoot),
    Content(ContentId),
}

/// Where a block and its tokens are looked up: a hint that is always verified.
pub(crate) type ContentHash = u64;

/// What became of a full block that was offered for registration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Registration {
    /// The block can be found from now on, and must not be written any more.
    New,
    /// Another block holds the same prefix already: hold that one instead.
    Known(BlockId),
    /// Another prefix has the same hash. The block stays private; that costs a recomputation, never
    /// correctness.
    Refused,
}

/// All blocks of one model's cache.
pub(crate) struct BlockPool {
    blocks: Vec<Block>,
    block_tokens: usize,
    /// The tokens of the registered blocks, `block_tokens` per block.
    tokens: Vec<u32>,
    findable: HashMap<ContentHash, BlockId>,
    contents: u64,
    free: FreeList,
}

struct Block {
    holders: u32,
    content: Option<Content>,
    previous: u32,
    next: u32,
}

#[derive(Clone, Copy)]
struct Content {
    id: ContentId,
    parent: Parent,
    hash: ContentHash,
}

/// The free blocks as a list through `Block::{previous, next}`: taken from the front, so that blocks without
/// content go first and findable ones in the order of their release; unlinked from anywhere when they are
/// found again.
struct FreeList {
    front: u32,
    back: u32,
    len: usize,
}

impl BlockPool {
    pub(crate) fn new(blocks: usize, block_tokens: usize) -> Self {
        let count = u32::try_from(blocks).ok().filter(|&count| count != NONE);
        let count = count.expect("a pool has fewer than 2^32 - 1 blocks");
        let block = || Block { holders: 0, content: None, previous: NONE, next: NONE };
        let mut pool = Self {
            blocks: (0..blocks).map(|_| block()).collect(),
            block_tokens,
            tokens: vec![0; blocks * block_tokens],
            findable: HashMap::new(),
            contents: 0,
            free: FreeList { front: NONE, back: NONE, len: 0 },
        };
        (0..count).for_each(|block| pool.link_back(block));
        pool
    }

    pub(crate) fn total(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks that nobody holds, findable or not.
    pub(crate) fn free(&self) -> usize {
        self.free.len
    }

    /// Blocks that can be found by their tokens, held or not.
    pub(crate) fn findable(&self) -> usize {
        self.findable.len()
    }

    pub(crate) fn holders(&self, block: BlockId) -> usize {
        self.blocks[block.0 as usize].holders as usize
    }

    /// A registered block as the parent of the one after it.
    pub(crate) fn as_parent(&self, block: BlockId) -> Option<Parent> {
        self.blocks[block.0 as usize].content.map(|content| Parent::Content(content.id))
    }

    /// A free block for one holder to write into; what it held before is forgotten.
    pub(crate) fn allocate(&mut self) -> Option<BlockId> {
        let front = self.free.front;
        if front == NONE {
            return None;
        }
        self.unlink(front);
        self.forget(BlockId(front));
        self.blocks[front as usize].holders = 1;
        Some(BlockId(front))
    }

    /// One more holder of a block that is held or findable.
    pub(crate) fn hold(&mut self, block: BlockId) {
        if self.holders(block) == 0 {
            debug_assert!(self.as_parent(block).is_some(), "a free block without content cannot be held");
            self.unlink(block.0);
        }
        self.blocks[block.0 as usize].holders += 1;
    }

    /// One holder less. Release a sequence's blocks from last to first: the ends of prefixes are then reused
    /// before their beginnings, which are likelier to be asked for again, and a child never outlives its
    /// parent's content.
    pub(crate) fn release(&mut self, block: BlockId) {
        let slot = &mut self.blocks[block.0 as usize];
        slot.holders = slot.holders.checked_sub(1).expect("a released block is held");
        if slot.holders == 0 {
            match slot.content {
                Some(_) => self.link_back(block.0),
                None => self.link_front(block.0),
            }
        }
    }

    pub(crate) fn hash(parent: Parent, tokens: &[u32]) -> ContentHash {
        let mut hasher = DefaultHasher::new();
        parent.hash(&mut hasher);
        tokens.hash(&mut hasher);
        hasher.finish()
    }

    /// The block that holds these tokens after this parent.
    pub(crate) fn find(&self, parent: Parent, tokens: &[u32]) -> Option<BlockId> {
        let block = *self.findable.get(&Self::hash(parent, tokens))?;
        self.is(block, parent, tokens).then_some(block)
    }

    /// Makes a full, computed block findable.
    pub(crate) fn register(&mut self, block: BlockId, parent: Parent, tokens: &[u32]) -> Registration {
        debug_assert_eq!(tokens.len(), self.block_tokens, "only full blocks are registered");
        let hash = Self::hash(parent, tokens);
        match self.findable.get(&hash) {
            Some(&known) if self.is(known, parent, tokens) => return Registration::Known(known),
            Some(_) => return Registration::Refused,
            None => {}
        }
        self.contents += 1;
        self.blocks[block.0 as usize].content = Some(Content { id: ContentId(self.contents), parent, hash });
        let start = block.0 as usize * self.block_tokens;
        self.tokens[start..start + self.block_tokens].copy_from_slice(tokens);
        self.findable.insert(hash, block);
        Registration::New
    }

    /// Ends the registration of a block, so that its only holder may write into it again.
    pub(crate) fn forget(&mut self, block: BlockId) {
        if let Some(content) = self.blocks[block.0 as usize].content.take() {
            self.findable.remove(&content.hash);
        }
    }

    fn is(&self, block: BlockId, parent: Parent, tokens: &[u32]) -> bool {
        let start = block.0 as usize * self.block_tokens;
        let same_parent =
            self.blocks[block.0 as usize].content.is_some_and(|content| content.parent == parent);
        same_parent && self.tokens[start..start + self.block_tokens] == *tokens
    }

    fn link_back(&mut self, block: u32) {
        let back = std::mem::replace(&mut self.free.back, block);
        self.blocks[block as usize].previous = back;
        self.blocks[block as usize].next = NONE;
        match back {
            NONE => self.free.front = block,
            _ => self.blocks[back as usize].next = block,
        }
        self.free.len += 1;
    }

    fn link_front(&mut self, block: u32) {
        let front = std::mem::replace(&mut self.free.front, block);
        self.blocks[block as usize].previous = NONE;
        self.blocks[block as usize].next = front;
        match front {
            NONE => self.free.back = block,
            _ => self.blocks[front as usize].previous = block,
        }
        self.free.len += 1;
    }

    fn unlink(&mut self, block: u32) {
        let Block { previous, next, .. } = self.blocks[block as usize];
        match previous {
            NONE => self.free.front = next,
            _ => self.blocks[previous as usize].next = next,
        }
        match next {
            NONE => self.free.back = previous,
            _ => self.blocks[next as usize].previous = previous,
        }
        self.free.len -= 1;
    }

    /// Checks that the free list, the holders and the index agree with each other. For tests.
    #[cfg(test)]
    pub(crate) fn audit(&self, tables: &[&[BlockId]]) {
        let mut holders = vec![0; self.blocks.len()];
        tables.iter().flat_map(|table| table.iter()).for_each(|block| holders[block.0 as usize] += 1);
        let mut listed = vec![false; self.blocks.len()];
        let (mut at, mut before, mut len) = (self.free.front, NONE, 0);
        while at != NONE {
            assert!(!std::mem::replace(&mut listed[at as usize], true), "block {at} is free twice");
            assert_eq!(self.blocks[at as usize].previous, before);
            (before, at, len) = (at, self.blocks[at as usize].next, len + 1);
        }
        assert_eq!((before, len), (self.free.back, self.free.len));
        for (number, block) in self.blocks.iter().enumerate() {
            assert_eq!(block.holders, holders[number], "holders of block {number}");
            assert_eq!(listed[number], block.holders == 0, "block {number} is free iff nobody holds it");
            assert!(block.holders <= 1 || block.content.is_some(), "block {number} is shared but not full");
            if let Some(content) = block.content {
                assert_eq!(self.findable.get(&content.hash), Some(&BlockId(number as u32)));
            }
        }
        assert_eq!(self.findable.len(), self.blocks.iter().filter(|block| block.content.is_some()).count());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOT: Parent = Parent::Root(CacheRoot(0));

    fn filled(pool: &mut BlockPool, parent: Parent, tokens: &[u32]) -> BlockId {
        let block = pool.allocate().unwrap();
        assert_eq!(pool.register(block, parent, tokens), Registration::New);
        block
    }

    #[test]
    fn the_same_tokens_after_another_prefix_or_under_another_root_are_not_found() {
        let mut pool = BlockPool::new(4, 2);
        let first = filled(&mut pool, ROOT, &[1, 2]);
        let parent = pool.as_parent(first).unwrap();
        let second = filled(&mut pool, parent, &[1, 2]);
        assert_eq!(pool.find(ROOT, &[1, 2]), Some(first));
        assert_eq!(pool.find(parent, &[1, 2]), Some(second));
        assert_eq!(pool.find(Parent::Root(CacheRoot(1)), &[1, 2]), None);
        assert_eq!(pool.register(second, ROOT, &[1, 2]), Registration::Known(first));
        pool.audit(&[&[first, second]]);
    }

    #[test]
    fn a_prefix_whose_first_block_was_reused_does_not_come_back_under_a_new_content() {
        let mut pool = BlockPool::new(2, 1);
        let first = filled(&mut pool, ROOT, &[1]);
        let old = pool.as_parent(first).unwrap();
        let child = filled(&mut pool, old, &[2]);
        pool.forget(first);
        assert_eq!(pool.register(first, ROOT, &[1]), Registration::New);
        let new = pool.as_parent(first).unwrap();
        assert_eq!(pool.find(new, &[2]), None, "the child belongs to a content that is gone");
        pool.audit(&[&[first, child]]);
    }

    #[test]
    fn a_hash_that_two_prefixes_share_is_never_a_hit() {
        let mut pool = BlockPool::new(2, 2);
        let first = filled(&mut pool, ROOT, &[1, 2]);
        let second = pool.allocate().unwrap();
        for (parent, tokens) in [(ROOT, [1, 9]), (pool.as_parent(first).unwrap(), [1, 2])] {
            pool.findable.insert(BlockPool::hash(parent, &tokens), first);
            assert_eq!(pool.find(parent, &tokens), None);
            assert_eq!(pool.register(second, parent, &tokens), Registration::Refused);
        }
    }

    #[test]
    fn memory_is_taken_from_empty_blocks_first_and_then_from_the_least_recently_released() {
        let mut pool = BlockPool::new(3, 1);
        let [a, b] = [1, 2].map(|token| filled(&mut pool, ROOT, &[token]));
        let empty = pool.allocate().unwrap();
        for block in [a, b, empty] {
            pool.release(block);
        }
        pool.hold(a);
        pool.release(a);
        assert_eq!(pool.allocate(), Some(empty));
        assert_eq!(pool.allocate(), Some(b));
        assert_eq!((pool.find(ROOT, &[1]), pool.find(ROOT, &[2])), (Some(a), None));
        assert_eq!(pool.allocate(), Some(a));
        assert_eq!((pool.allocate(), pool.findable()), (None, 0));
        pool.audit(&[&[a, b, empty]]);
    }
}
