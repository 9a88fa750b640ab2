//! Replies, taken apart.

use crate::entry::Token;
use crate::error::{Error, Result};
use crate::settings::Pace;
use redis::Value;
use std::time::Duration;

/// A reply, taken apart from front to back.
pub(crate) struct Answer {
    call: &'static str,
    values: std::vec::IntoIter<Value>,
}

impl Answer {
    pub fn to(call: &'static str, value: Value) -> Result<Self> {
        match value {
            Value::Array(values) => Ok(Self {
                call,
                values: values.into_iter(),
            }),
            _ => Err(Error::protocol(call, "it is not a list")),
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.values.as_slice().is_empty()
    }

    pub(crate) fn next(&mut self) -> Result<Value> {
        self.values
            .next()
            .ok_or_else(|| Error::protocol(self.call, "it is too short"))
    }

    pub fn rest(self) -> std::vec::IntoIter<Value> {
        self.values
    }

    pub fn all_bytes(self) -> Result<Vec<Vec<u8>>> {
        let call = self.call;
        self.values.map(|value| bytes(call, value)).collect()
    }

    pub fn list(&mut self) -> Result<Self> {
        Self::to(self.call, self.next()?)
    }

    pub fn bytes(&mut self) -> Result<Vec<u8>> {
        let value = self.next()?;
        bytes(self.call, value)
    }

    pub fn text(&mut self) -> Result<String> {
        let bytes = self.bytes()?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    pub fn integer(&mut self) -> Result<i64> {
        match self.next()? {
            Value::Int(number) => Ok(number),
            _ => Err(Error::protocol(self.call, "a number was expected")),
        }
    }

    pub fn number(&mut self) -> Result<u64> {
        let value = self.next()?;
        whole(self.call, value)
    }

    pub fn score(&mut self) -> Result<f64> {
        match self.next()? {
            Value::Double(score) => Ok(score),
            value => String::from_utf8_lossy(&bytes(self.call, value)?)
                .parse()
                .map_err(|_| Error::protocol(self.call, "a score is not a number")),
        }
    }

    pub fn pace(&mut self) -> Result<Pace> {
        let (step, ttl) = (
            Duration::from_millis(self.number()?),
            Duration::from_millis(self.number()?),
        );
        if step.is_zero() || ttl.is_zero() {
            return Err(Error::protocol(self.call, "step and ttl must be more than 0"));
        }
        Ok(Pace { step, ttl })
    }
}

pub(crate) fn bytes(call: &'static str, value: Value) -> Result<Vec<u8>> {
    match value {
        Value::BulkString(bytes) => Ok(bytes),
        Value::SimpleString(text) => Ok(text.into_bytes()),
        _ => Err(Error::protocol(call, "a text was expected")),
    }
}

pub(crate) fn whole(call: &'static str, value: Value) -> Result<u64> {
    match value {
        Value::Int(number) => u64::try_from(number).map_err(|_| Error::protocol(call, "a number is negative")),
        _ => Err(Error::protocol(call, "a number was expected")),
    }
}

pub(super) fn token_of(call: &'static str, bytes: Vec<u8>) -> Result<Token> {
    Token::read(bytes).ok_or_else(|| Error::protocol(call, "a token was expected"))
}
