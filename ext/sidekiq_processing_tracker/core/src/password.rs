//! Passwords that change while a process runs: asked for anew before each login, of somebody who knows them.
//!
//! The native thread that logs in leaves a question and waits for a while; a thread of the application's answers. Neither
//! holds a lock meanwhile. Where no answer comes in time (Ruby is held up), the last one is tried again, so a held GVL
//! costs nothing as long as the password is still the same.

use crate::parker::{lock, Parker};
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A password.
#[derive(Clone, Default)]
pub enum Password {
    /// There is none: nobody logs in.
    #[default]
    None,
    /// This one.
    Fixed(String),
    /// Whatever is answered to this question.
    Asked(Arc<Desk>, usize),
}

impl Password {
    /// The password for a login now. Waits for an answer, `within` this time.
    pub(crate) fn get(&self, within: Duration) -> Option<String> {
        match self {
            Self::None => None,
            Self::Fixed(password) => Some(password.clone()),
            Self::Asked(desk, question) => desk.ask(*question, within),
        }
    }
}

impl<T: Into<String>> From<T> for Password {
    fn from(password: T) -> Self {
        Self::Fixed(password.into())
    }
}

impl fmt::Debug for Password {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Password")
    }
}

/// Where passwords are asked for, and answered.
#[derive(Default)]
pub struct Desk {
    state: Mutex<State>,
    answered: Condvar,
}

#[derive(Default)]
struct State {
    questions: Vec<Question>,
    /// Who waits for a question to be asked.
    listener: Option<Arc<Parker>>,
    closed: bool,
}

/// Asked so many times, and answered up to that one.
#[derive(Default)]
struct Question {
    asked: u64,
    answered: u64,
    last: Option<String>,
}

/// What is asked.
#[derive(Debug)]
pub enum Asked {
    /// This question, for the so manyeth time.
    Question(usize, u64),
    /// Nothing yet: wait, then look again.
    Wait(Arc<Parker>),
    /// Nothing any more.
    Closed,
}

impl Desk {
    /// Adds a question and its first answer. Returns its number.
    pub fn add(&self, first: Option<String>) -> usize {
        let mut state = lock(&self.state);
        state.questions.push(Question {
            last: first,
            ..Question::default()
        });
        state.questions.len() - 1
    }

    fn ask(&self, question: usize, within: Duration) -> Option<String> {
        let deadline = Instant::now() + within;
        let mut state = lock(&self.state);
        let number = state.questions.get_mut(question).map(|question| {
            question.asked += 1;
            question.asked
        })?;
        if let Some(listener) = state.listener.take() {
            listener.unpark();
        }
        while !state.closed && state.questions[question].answered < number {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            state = self
                .answered
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        state.questions[question].last.clone()
    }

    /// What is asked now. Never blocks.
    pub fn next(&self) -> Asked {
        let mut state = lock(&self.state);
        if state.closed {
            return Asked::Closed;
        }
        let open = |question: &Question| question.answered < question.asked;
        if let Some(at) = state.questions.iter().position(open) {
            return Asked::Question(at, state.questions[at].asked);
        }
        Asked::Wait(state.listener.get_or_insert_with(Parker::new).clone())
    }

    /// Answers a question as often as it was asked then. `None` where it cannot be answered: the last answer holds.
    pub fn answer(&self, question: usize, number: u64, answer: Option<Option<String>>) {
        if let Some(question) = lock(&self.state).questions.get_mut(question) {
            question.answered = question.answered.max(number);
            if let Some(answer) = answer {
                question.last = answer;
            }
        }
        self.answered.notify_all();
    }

    /// Nobody answers any more.
    pub fn close(&self) {
        let mut state = lock(&self.state);
        state.closed = true;
        if let Some(listener) = state.listener.take() {
            listener.unpark();
        }
        drop(state);
        self.answered.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    const LONG: Duration = Duration::from_secs(20);

    fn answering(desk: &Arc<Desk>, answers: Vec<Option<Option<String>>>) -> thread::JoinHandle<()> {
        let desk = desk.clone();
        thread::spawn(move || {
            let mut answers = answers.into_iter();
            loop {
                match desk.next() {
                    Asked::Question(question, number) => desk.answer(question, number, answers.next().unwrap()),
                    Asked::Wait(parker) => {
                        parker.wait(None);
                    }
                    Asked::Closed => return,
                }
            }
        })
    }

    #[test]
    fn each_login_asks_anew() {
        let desk = Arc::new(Desk::default());
        let password = Password::Asked(desk.clone(), desk.add(Some("first".into())));
        let thread = answering(&desk, vec![Some(Some("second".into())), None, Some(None)]);
        assert_eq!(password.get(LONG).as_deref(), Some("second"));
        assert_eq!(password.get(LONG).as_deref(), Some("second"));
        assert_eq!(password.get(LONG), None);
        desk.close();
        thread.join().unwrap();
    }

    #[test]
    fn without_an_answer_the_last_one_holds() {
        let desk = Arc::new(Desk::default());
        let password = Password::Asked(desk.clone(), desk.add(Some("first".into())));
        assert_eq!(password.get(Duration::from_millis(1)).as_deref(), Some("first"));
        desk.close();
        assert_eq!(password.get(LONG).as_deref(), Some("first"));
    }
}
