//! A token: the name that a job has in an in-flight hash, `<call>-<i> <taken_at_ms> <queue>`. A plus after the number says that
//! its payload has a list of its own.

/// A token and what it says. The queue comes last, since its name may hold anything.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Token {
    bytes: Vec<u8>,
    call: u64,
    index: u64,
    has_list: bool,
    taken_at_ms: u64,
    queue_at: usize,
}

impl Token {
    /// Reads a field of an in-flight hash; `None` for one that is no token.
    #[must_use]
    pub fn read(bytes: Vec<u8>) -> Option<Self> {
        let mut parts = bytes.splitn(3, |byte| *byte == b' ');
        let (name, taken_at, queue) = (parts.next()?, parts.next()?, parts.next()?);
        let (name, has_list) = match name.strip_suffix(b"+") {
            Some(name) => (name, true),
            None => (name, false),
        };
        let dash = name.iter().position(|byte| *byte == b'-')?;
        Some(Self {
            call: number(&name[..dash])?,
            index: number(&name[dash + 1..])?,
            has_list,
            taken_at_ms: number(taken_at)?,
            queue_at: bytes.len() - queue.len(),
            bytes,
        })
    }

    /// The token as it stands in Redis.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Its place in the turn that made it, from 1.
    #[must_use]
    pub fn index(&self) -> u64 {
        self.index
    }

    /// Whether the payload has a list of its own (`Keys::payload`).
    #[must_use]
    pub fn has_list(&self) -> bool {
        self.has_list
    }

    /// When the job was taken, in ms since the epoch by Redis' clock.
    #[must_use]
    pub fn taken_at_ms(&self) -> u64 {
        self.taken_at_ms
    }

    /// The name of the queue it was taken from.
    #[must_use]
    pub fn queue(&self) -> &[u8] {
        &self.bytes[self.queue_at..]
    }

    /// The order in which the jobs were taken.
    #[must_use]
    pub fn order(&self) -> (u64, u64) {
        (self.call, self.index)
    }
}

/// A whole number in decimal digits.
pub(crate) fn number(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(digits).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::Token;

    #[test]
    fn reads_what_turn_writes() {
        let token = Token::read(b"12-3 1700000000000 a b\nc".to_vec()).unwrap();
        assert_eq!(token.order(), (12, 3));
        assert_eq!(token.index(), 3);
        assert_eq!(token.taken_at_ms(), 1_700_000_000_000);
        assert_eq!(token.queue(), b"a b\nc");
        assert_eq!(token.as_bytes(), b"12-3 1700000000000 a b\nc");
        assert!(!token.has_list());
        let large = Token::read(b"12-3+ 1700000000000 a+".to_vec()).unwrap();
        assert_eq!(
            (large.order(), large.queue(), large.has_list()),
            ((12, 3), &b"a+"[..], true)
        );
    }

    #[test]
    fn leaves_alone_what_is_no_token() {
        for field in [
            "call",
            "",
            "1-1",
            "1-1 5",
            "x-1 5 q",
            "1-+1 5 q",
            "1-1++ 5 q",
            "1-+ 5 q",
            "1 5 q",
            "1-1 5.0 q",
        ] {
            assert!(Token::read(field.into()).is_none(), "{field:?}");
        }
        assert_eq!(Token::read(b"1-1 5 ".to_vec()).unwrap().queue(), b"");
    }
}
