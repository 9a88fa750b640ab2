//! Where a request or a reply ends in a stream of RESP bytes. Nothing more of the protocol is understood.

/// One complete reply at the start of a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Its length in bytes.
    pub len: usize,
    /// A push message (RESP3): it belongs to no request.
    pub push: bool,
}

/// The line that starts at `from`: its content (without type byte and CRLF) and where the next one starts.
fn line(buf: &[u8], from: usize) -> Option<(&[u8], usize)> {
    let end = buf[from..].iter().position(|&b| b == b'\n')? + from;
    Some((buf[from + 1..end].strip_suffix(b"\r").unwrap_or_default(), end + 1))
}

fn number(text: &[u8]) -> i64 {
    std::str::from_utf8(text)
        .ok()
        .and_then(|t| t.parse().ok())
        .unwrap_or_else(|| panic!("no RESP length: {:?}", String::from_utf8_lossy(text)))
}

/// The first frame in `buf`, `None` while it is incomplete.
///
/// Panics on bytes that are no RESP.
pub fn frame(buf: &[u8]) -> Option<Frame> {
    let push = *buf.first()? == b'>';
    let mut at = 0;
    let mut wanted = 1u64;
    while wanted > 0 {
        let kind = *buf.get(at)?;
        let (text, next) = line(buf, at)?;
        at = next;
        wanted -= 1;
        match kind {
            b'+' | b'-' | b':' | b'_' | b',' | b'#' | b'(' => {}
            b'$' | b'!' | b'=' => {
                if let Ok(len) = usize::try_from(number(text)) {
                    at += len + 2;
                }
            }
            b'*' | b'~' | b'>' => wanted += u64::try_from(number(text)).unwrap_or(0),
            b'%' => wanted += 2 * u64::try_from(number(text)).unwrap_or(0),
            // An attribute stands before the value that it describes.
            b'|' => wanted += 2 * u64::try_from(number(text)).unwrap_or(0) + 1,
            other => panic!("no RESP type: {:?}", char::from(other)),
        }
    }
    (at <= buf.len()).then_some(Frame { len: at, push })
}

/// The length of the first request in `buf` and how many replies it gets, `None` while it is incomplete. A request that is no
/// array is an inline command: one line. A transaction is one request, from its MULTI to its EXEC.
pub fn request(buf: &[u8]) -> Option<(usize, usize)> {
    let (mut len, mut replies) = (command(buf)?, 1);
    if is(buf, len, b"MULTI") {
        loop {
            let next = command(&buf[len..])?;
            let ends = is(&buf[len..], next, b"EXEC");
            (len, replies) = (len + next, replies + 1);
            if ends {
                break;
            }
        }
    }
    Some((len, replies))
}

fn is(buf: &[u8], len: usize, name: &[u8]) -> bool {
    args(&buf[..len])
        .first()
        .is_some_and(|first| first.eq_ignore_ascii_case(name))
}

fn command(buf: &[u8]) -> Option<usize> {
    if *buf.first()? == b'*' {
        return frame(buf).map(|f| f.len);
    }
    buf.iter().position(|&b| b == b'\n').map(|end| end + 1)
}

/// The arguments of one complete request, the command's name first; of a transaction, those of MULTI.
pub fn args(request: &[u8]) -> Vec<&[u8]> {
    if request.first() != Some(&b'*') {
        return request
            .split(|b| b.is_ascii_whitespace())
            .filter(|word| !word.is_empty())
            .collect();
    }
    let (count, mut at) = line(request, 0).expect("a complete request");
    let mut found = Vec::new();
    for _ in 0..number(count).max(0) {
        let (len, start) = line(request, at).expect("a complete request");
        let end = start + usize::try_from(number(len)).expect("a bulk string");
        found.push(&request[start..end]);
        at = end + 2;
    }
    found
}

/// A request as bytes.
pub fn encode(args: &[&[u8]]) -> Vec<u8> {
    let mut bytes = format!("*{}\r\n", args.len()).into_bytes();
    for arg in args {
        bytes.extend_from_slice(format!("${}\r\n", arg.len()).as_bytes());
        bytes.extend_from_slice(arg);
        bytes.extend_from_slice(b"\r\n");
    }
    bytes
}
