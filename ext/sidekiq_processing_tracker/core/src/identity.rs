//! Who an instance is.

use crate::error::{Error, Result};

/// Draws a new identity, `instance_id:pid:nonce`. The nonce is 128 bits from the operating system, so a restarted
/// process under the same name is another instance, and so is this one after a fork or a lost lease.
///
/// # Errors
/// `Error::Internal` when the operating system gives no random bytes.
pub fn draw(instance_id: &str) -> Result<String> {
    Ok(format!("{instance_id}:{}:{}", std::process::id(), nonce()?))
}

/// The label and the process id in an identity, `None` for one of another form. Labels may hold colons.
#[must_use]
pub fn parts(identity: &[u8]) -> Option<(&[u8], u32)> {
    let mut parts = identity.rsplitn(3, |byte| *byte == b':');
    let (nonce, pid, label) = (parts.next()?, parts.next()?, parts.next()?);
    let pid = std::str::from_utf8(pid).ok()?.parse().ok()?;
    (nonce.len() == 32 && nonce.iter().all(u8::is_ascii_hexdigit)).then_some((label, pid))
}

/// 128 bits from the operating system, in hexadecimal digits.
pub(crate) fn nonce() -> Result<String> {
    Ok(format!("{:032x}", u128::from_le_bytes(random()?)))
}

/// A number in `0.0..1.0` to spread what many instances would else do at the same moment.
pub(crate) fn jitter() -> f64 {
    random::<4>().map_or(0.5, |bytes| {
        f64::from(u32::from_le_bytes(bytes)) / (f64::from(u32::MAX) + 1.0)
    })
}

/// The seed of a generator for what need not be secret.
///
/// # Errors
/// `Error::Internal` when the operating system gives no random bytes.
pub(crate) fn seed() -> Result<u64> {
    Ok(u64::from_le_bytes(random()?))
}

fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes)
        .map_err(|error| Error::Internal(format!("no random bytes from the system: {error}")))?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    #[test]
    fn is_read_from_its_end() {
        let drawn = super::draw("pod:a:1").unwrap();
        assert_eq!(
            super::parts(drawn.as_bytes()),
            Some((&b"pod:a:1"[..], std::process::id()))
        );
        for other in ["1.0 web:1", "a:1:short", "a:x:00000000000000000000000000000000", ""] {
            assert_eq!(super::parts(other.as_bytes()), None);
        }
    }

    #[test]
    fn names_the_instance_the_process_and_a_nonce() {
        let one = super::draw("pod:a").unwrap();
        let two = super::draw("pod:a").unwrap();
        assert!(one.starts_with(&format!("pod:a:{}:", std::process::id())));
        assert_eq!(one.rsplit(':').next().unwrap().len(), 32);
        assert_ne!(one, two);
    }
}
