//! The scripts as Redis knows them: to recognise a call on its way, or to make one that the crate does not make.

use std::sync::LazyLock;

use redis::Script;

use super::proxy::Request;

macro_rules! script {
    ($name:ident, $($file:literal),+) => {
        /// The script of that name.
        pub static $name: LazyLock<Script> =
            LazyLock::new(|| Script::new(concat!($(include_str!(concat!("../../src/lua/", $file, ".lua"))),+)));
    };
}

script!(REGISTER, "clock", "index", "register");
script!(BEAT, "lease", "clock", "beat");
script!(TURN, "lease", "payloads", "requeue", "turn");
script!(TAKE, "lease", "hands", "take");
script!(OPEN, "lease", "hands", "open");
script!(REAP, "clock", "payloads", "hands", "reap");
script!(PEEK, "payloads", "peek");
script!(
    RECOVER,
    "lease",
    "clock",
    "payloads",
    "requeue",
    "unique_locks",
    "dead_set",
    "recover"
);
script!(LEAVE, "lease", "payloads", "requeue", "hands", "leave");
script!(CLAIM_DUE, "lease", "claim_due");
script!(SETTLE_DUE, "lease", "settle_due");
script!(RETURN_DUE, "lease", "return_due");
script!(LEGACY_REAP, "clock", "legacy_standing", "legacy_reap");
script!(
    LEGACY_MOVE,
    "clock",
    "requeue",
    "unique_locks",
    "dead_set",
    "legacy_standing",
    "legacy_move"
);

/// Whether a request calls this script, by its hash or whole.
pub fn is_call(request: &Request, script: &Script) -> bool {
    let args = request.args();
    let Some(text) = args.get(1) else { return false };
    match request.command().as_str() {
        "EVALSHA" => *text == script.get_hash().as_bytes(),
        "EVAL" => Script::new(&String::from_utf8_lossy(text)).get_hash() == script.get_hash(),
        _ => false,
    }
}

/// Whether a request is a turn, by its script or without.
pub fn is_turn(request: &Request) -> bool {
    is_call(request, &TURN) || request.is_transaction()
}

/// Whether a request may come twice. All of ours may but `register`, which is sent once a nonce, and a blocking claim, which is never
/// sent again: it may come late.
pub fn may_repeat(request: &Request) -> bool {
    let is_claim = request.command() == "BLMOVE" || is_call(request, &TAKE);
    !request.is_setup() && !request.is_transaction() && !is_claim && !is_call(request, &REGISTER)
}
