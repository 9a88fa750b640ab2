//! The wake thread: is told by Redis when a queue changes in which this instance has looked for jobs in vain.
//!
//! The claims thread looks, and asks Redis to tell this connection of changes in what it has looked at (docs/protocol.md,
//! "Waiting for work"). Then this thread claims.

use crate::claims;
use crate::control::Attempts;
use crate::error::{Error, Result};
use crate::parker::lock;
use crate::server::{self, Opened};
use crate::shared::{Phase, Shared};
use crate::wire::{Bell, Line};
use redis::Value;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

/// The channel on which Redis tells of changes.
const CHANNEL: &str = "__redis__:invalidate";
/// How long one read of an encrypted connection lasts: so soon does the thread notice that it is to end.
const SLICE: Duration = Duration::from_millis(250);
/// The same for others, where it is woken for that: so soon does it notice that another link has found another server.
const A_WHILE: Duration = Duration::from_secs(1);

/// How long threads wait for jobs of a queue without a claim before there is a connection that is told of them: mostly there is a claim
/// by then. Meanwhile Redis is asked.
const LISTEN_AFTER: Duration = Duration::from_millis(20);

pub(crate) fn run(shared: Arc<Shared>) {
    let mut attempts = Attempts::default();
    let bell = match Bell::new() {
        Ok(bell) => Arc::new(bell),
        Err(error) => {
            return shared.warn_once(
                "wake",
                format!("Redis is asked for new jobs from time to time: {error}"),
            )
        }
    };
    *lock(&shared.wake_bell) = Some(bell.clone());
    while wait_for_need(&shared, &attempts) {
        let outcome = listen(&shared, &bell, &mut attempts);
        let mut state = shared.state();
        state.told = None;
        shared.nudge(&mut state);
        let pace = state.pace;
        drop(state);
        if let Err(error) = outcome {
            attempts.failed(pace);
            if let Error::Refused(text) = &error {
                // Without being told, it looks from time to time.
                shared.warn_once(
                    "wake",
                    format!("Redis does not tell of new jobs, so it is asked from time to time: {text}"),
                );
            }
        }
    }
    *lock(&shared.wake_bell) = None;
}

/// Waits until somebody takes jobs and Redis may be tried. Answers whether the thread is to go on.
fn wait_for_need(shared: &Shared, attempts: &Attempts) -> bool {
    let mut state = shared.state();
    loop {
        if matches!(state.phase, Phase::Left | Phase::Stopped) {
            return false;
        }
        let now = Instant::now();
        let unclaimed = state.unclaimed;
        let needed = state.registered && unclaimed.any && !shared.settings.polls;
        let since = unclaimed.since.unwrap_or(now);
        let at = attempts.at.unwrap_or(now).max(since + LISTEN_AFTER);
        if needed && at <= now {
            return true;
        }
        let pause = if needed { at - now } else { Duration::from_secs(60) };
        state = shared
            .alarm_wake
            .wait_timeout(state, pause.max(Duration::from_millis(1)))
            .unwrap_or_else(PoisonError::into_inner)
            .0;
    }
}

fn listen(shared: &Shared, bell: &Bell, attempts: &mut Attempts) -> Result<()> {
    let timeout = shared.settings.pace().step.max(Duration::from_secs(1));
    let target = &shared.settings.redis;
    let Opened { mut line, visit } = server::open(target, timeout, true).map_err(|error| error.at(target))?;
    line.send(&redis::cmd("CLIENT").arg("ID").get_packed_command())?;
    let Value::Int(id) = line.receive()?.extract_error()? else {
        return Err(Error::protocol("CLIENT ID", "a number was expected"));
    };
    match line {
        Line::Library(mut connection) => {
            let mut messages = connection.as_pubsub();
            messages.subscribe(CHANNEL)?;
            messages.set_read_timeout(Some(SLICE))?;
            attempts.succeeded();
            attend(shared, visit, id, || match messages.get_message() {
                Err(error) if !error.is_timeout() => Err(error.into()),
                message => Ok(message.is_ok()),
            })
        }
        Line::Wire(mut wire) => {
            let subscribed = wire.ask(&redis::cmd("SUBSCRIBE").arg(CHANNEL).get_packed_command())?;
            subscribed.extract_error()?;
            attempts.succeeded();
            attend(shared, visit, id, || wire.hear(bell, A_WHILE))
        }
    }
}

/// Claims whenever `hears` says that there is news. It waits for that, for a while.
fn attend(shared: &Shared, visit: u64, id: i64, mut hears: impl FnMut() -> Result<bool>) -> Result<()> {
    let mut state = shared.state();
    state.told = Some(id);
    shared.nudge(&mut state);
    drop(state);
    loop {
        if hears()? {
            claims::answer_alarm(shared);
        }
        // Another link has found another server: that one is to tell.
        let state = shared.state();
        let unclaimed = state.unclaimed;
        let is_over = matches!(state.phase, Phase::Left | Phase::Stopped)
            || state.distrusted == Some(id)
            || !unclaimed.any && unclaimed.is_over(Instant::now());
        if is_over || !shared.settings.redis.rendezvous.is_current(visit) {
            return Ok(());
        }
    }
}
