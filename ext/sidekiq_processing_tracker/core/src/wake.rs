//! The wake thread: is told by Redis when a queue changes in which this instance has looked for jobs in vain.
//!
//! The claims thread looks, and asks Redis to tell this connection of changes in what it has looked at (docs/protocol.md,
//! "Waiting for work"). Then this thread claims.

use crate::claims;
use crate::control::Attempts;
use crate::error::{Error, Result};
use crate::server;
use crate::shared::{Phase, Shared};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

/// The channel on which Redis tells of changes.
const CHANNEL: &str = "__redis__:invalidate";
/// How long one read lasts: so soon does the thread notice that it is to end.
const SLICE: Duration = Duration::from_millis(250);

pub(crate) fn run(shared: Arc<Shared>) {
    let mut attempts = Attempts::default();
    while wait_for_need(&shared, &attempts) {
        let outcome = listen(&shared, &mut attempts);
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
}

/// Waits until somebody takes jobs and Redis may be tried. Answers whether the thread is to go on.
fn wait_for_need(shared: &Shared, attempts: &Attempts) -> bool {
    let mut state = shared.state();
    loop {
        if matches!(state.phase, Phase::Left | Phase::Stopped) {
            return false;
        }
        let now = Instant::now();
        let needed = state.registered && !state.registry.crews().is_empty() && !shared.settings.polls;
        if needed && attempts.is_due(now) {
            return true;
        }
        let pause = attempts
            .at
            .filter(|_| needed)
            .map_or(Duration::from_secs(60), |at| at.saturating_duration_since(now));
        state = shared
            .alarm_wake
            .wait_timeout(state, pause.max(Duration::from_millis(1)))
            .unwrap_or_else(PoisonError::into_inner)
            .0;
    }
}

fn listen(shared: &Shared, attempts: &mut Attempts) -> Result<()> {
    let timeout = shared.settings.pace().step.max(Duration::from_secs(1));
    let target = &shared.settings.redis;
    let server::Opened { mut connection, visit } = server::open(target, timeout).map_err(|error| error.at(target))?;
    let id: i64 = redis::cmd("CLIENT").arg("ID").query(&mut connection)?;
    let mut messages = connection.as_pubsub();
    messages.subscribe(CHANNEL)?;
    messages.set_read_timeout(Some(SLICE))?;
    attempts.succeeded();
    let mut state = shared.state();
    state.told = Some(id);
    shared.nudge(&mut state);
    drop(state);
    loop {
        match messages.get_message() {
            Ok(_) => claims::answer_alarm(shared),
            Err(error) if error.is_timeout() => {}
            Err(error) => return Err(error.into()),
        }
        // Another link has found another server: that one is to tell.
        let state = shared.state();
        let is_over = matches!(state.phase, Phase::Left | Phase::Stopped) || state.distrusted == Some(id);
        if is_over || !target.rendezvous.is_current(visit) {
            return Ok(());
        }
    }
}
