//! The settings Hash that Ruby passes. Ruby has validated it; what is missing or of a wrong type is a bug and raises.

use crate::passwords::Passwords;
use magnus::{r_hash::ForEach, value::ReprValue, Error, RArray, RHash, RString, Ruby, TryConvert, Value};
use processing_tracker_core::host::PROC;
use processing_tracker_core::password::Password;
use processing_tracker_core::sentinel::{Node, Sentinels};
use processing_tracker_core::settings::{Fetch, Policy, Settings, Timestamps};
use processing_tracker_core::target::{Address, Target};
use processing_tracker_core::tls::{Pem, Tls, Verify};
use std::sync::Arc;
use std::time::Duration;

/// Reads the settings of an engine.
///
/// # Errors
/// `KeyError`, `TypeError`.
pub fn read(ruby: &Ruby, hash: RHash) -> Result<Settings, Error> {
    let mut info = Vec::new();
    let given: RHash = fetch(ruby, hash, "info")?;
    given.foreach(|field: String, value: String| {
        info.push((field, value));
        Ok(ForEach::Continue)
    })?;
    Ok(Settings {
        namespace: fetch(ruby, hash, "namespace")?,
        instance_id: fetch(ruby, hash, "instance_id")?,
        interval: millis(ruby, hash, "interval_ms")?,
        ttl: millis(ruby, hash, "ttl_ms")?,
        hold: millis(ruby, hash, "hold_ms")?,
        redis: target(ruby, fetch(ruby, hash, "redis")?)?,
        queues: match get::<RHash>(ruby, hash, "queues")? {
            Some(queues) => Some(target(ruby, queues)?),
            None => None,
        },
        info,
        polls: get(ruby, hash, "polls")?.unwrap_or(false),
        keep_control: Settings::KEEP_CONTROL,
        blocks: true,
        fetch: match get::<String>(ruby, hash, "fetch")?.as_deref() {
            Some("native") => Fetch::Native,
            _ => Fetch::Sidekiq,
        },
        policy: policy(ruby, hash)?,
        proc: Some(PROC.into()),
        exclusive: get(ruby, hash, "exclusive")?.unwrap_or(false),
    })
}

fn policy(ruby: &Ruby, hash: RHash) -> Result<Policy, Error> {
    let default = Policy::default();
    let duration = |key, default: Duration| -> Result<Duration, Error> {
        Ok(get::<u64>(ruby, hash, key)?.map_or(default, |millis| Duration::from_millis(millis.max(1))))
    };
    Ok(Policy {
        // nil is a value here: no limit.
        max_recoveries: match hash.get(ruby.to_symbol("max_recoveries")) {
            Some(value) if Value::is_nil(value) => None,
            Some(value) => Some(u64::try_convert(value)?),
            None => default.max_recoveries,
        },
        recovery_window: duration("recovery_window_ms", default.recovery_window)?,
        track_all: get(ruby, hash, "track_all")?.unwrap_or(default.track_all),
        timestamps: match get::<String>(ruby, hash, "timestamps")?.as_deref() {
            Some("milliseconds") => Timestamps::Milliseconds,
            _ => Timestamps::Seconds,
        },
        dead_max_jobs: get(ruby, hash, "dead_max_jobs")?.unwrap_or(default.dead_max_jobs),
        dead_timeout: duration("dead_timeout_ms", default.dead_timeout)?,
    })
}

/// Reads where Redis is.
///
/// # Errors
/// `KeyError`, `TypeError`.
pub fn target(ruby: &Ruby, hash: RHash) -> Result<Target, Error> {
    let desk = match get::<&Passwords>(ruby, hash, "passwords")? {
        Some(passwords) => Some(passwords.desk(ruby)?),
        None => None,
    };
    let password = |of: RHash| -> Result<Password, Error> {
        let password: Value = fetch(ruby, of, "password")?;
        if password.is_nil() {
            return Ok(Password::None);
        }
        match (RString::from_value(password), &desk) {
            (None, Some(desk)) => Ok(Password::Asked(desk.clone(), usize::try_convert(password)?)),
            _ => String::try_convert(password).map(Password::Fixed),
        }
    };
    let address = match (
        get::<String>(ruby, hash, "path")?,
        get::<RArray>(ruby, hash, "sentinels")?,
    ) {
        (Some(path), _) => Address::Unix(path.into()),
        (None, Some(sentinels)) => {
            let mut nodes = Vec::new();
            for sentinel in sentinels {
                let sentinel = RHash::try_convert(sentinel)?;
                nodes.push(Node {
                    host: fetch(ruby, sentinel, "host")?,
                    port: fetch(ruby, sentinel, "port")?,
                    username: get(ruby, sentinel, "username")?,
                    password: password(sentinel)?,
                    tls: tls(ruby, sentinel)?,
                });
            }
            Address::Sentinel(Arc::new(Sentinels::new(fetch(ruby, hash, "master")?, nodes)))
        }
        (None, None) => Address::Tcp(fetch(ruby, hash, "host")?, fetch(ruby, hash, "port")?),
    };
    let mut target = Target::new(address);
    target.db = get(ruby, hash, "db")?.unwrap_or(0);
    target.username = get(ruby, hash, "username")?;
    target.password = password(hash)?;
    target.tls = tls(ruby, hash)?;
    target.connect_timeout = millis(ruby, hash, "connect_timeout_ms")?;
    target.read_timeout = millis(ruby, hash, "read_timeout_ms")?;
    Ok(target)
}

fn tls(ruby: &Ruby, hash: RHash) -> Result<Option<Tls>, Error> {
    let Some(tls) = get::<RHash>(ruby, hash, "tls")? else {
        return Ok(None);
    };
    let pem = |name| -> Result<Option<Pem>, Error> {
        let pem = get::<String>(ruby, tls, name)?;
        Ok(pem.map(|pem| {
            if pem.contains("-----BEGIN ") {
                Pem::Text(pem)
            } else {
                Pem::File(pem.into())
            }
        }))
    };
    Ok(Some(Tls {
        ca_file: get::<String>(ruby, tls, "ca_file")?.map(Into::into),
        ca_path: get::<String>(ruby, tls, "ca_path")?.map(Into::into),
        cert: pem("cert")?,
        key: pem("key")?,
        verify: match get::<String>(ruby, tls, "verify")?.as_deref() {
            Some("none") => Verify::None,
            Some("chain") => Verify::Chain,
            _ => Verify::Full,
        },
    }))
}

fn millis(ruby: &Ruby, hash: RHash, key: &str) -> Result<Duration, Error> {
    fetch::<u64>(ruby, hash, key).map(|millis| Duration::from_millis(millis.max(1)))
}

fn fetch<T: TryConvert>(ruby: &Ruby, hash: RHash, key: &str) -> Result<T, Error> {
    hash.fetch(ruby.to_symbol(key))
}

fn get<T: TryConvert>(ruby: &Ruby, hash: RHash, key: &str) -> Result<Option<T>, Error> {
    match hash.get(ruby.to_symbol(key)) {
        Some(value) if !Value::is_nil(value) => T::try_convert(value).map(Some),
        _ => Ok(None),
    }
}
