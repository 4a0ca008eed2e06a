//! Why a request had no effect.

use std::io;

/// The kernel's refusal of one request.
#[derive(Debug, thiserror::Error)]
#[error("{}", self.sentence())]
pub struct Refusal {
    /// The error number.
    pub error: io::Error,
    /// The kernel's own words, where it has some.
    pub text: Option<String>,
}

impl Refusal {
    fn sentence(&self) -> String {
        match &self.text {
            Some(text) => format!("{text} ({})", self.error),
            None => self.error.to_string(),
        }
    }

    /// Whether the kernel gave one of these error numbers.
    pub fn is_one_of(&self, codes: &[i32]) -> bool {
        let code = self.error.raw_os_error();
        code.is_some_and(|code| codes.contains(&code))
    }
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Self { error, text: None }
    }
}

/// Why a request had no effect.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// Netlink does not work.
    #[error(transparent)]
    Socket(#[from] io::Error),
    /// The kernel refuses.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The kernel answers something else than was asked for.
    #[error("the kernel's answer is not understood")]
    Answer,
}

impl RequestError {
    /// Whether the kernel refuses with one of these error numbers.
    pub fn is_one_of(&self, codes: &[i32]) -> bool {
        matches!(self, Self::Refused(refusal) if refusal.is_one_of(codes))
    }
}

impl From<RequestError> for Refusal {
    fn from(error: RequestError) -> Self {
        match error {
            RequestError::Refused(refusal) => refusal,
            error => io::Error::from(error).into(),
        }
    }
}

impl From<RequestError> for io::Error {
    fn from(error: RequestError) -> Self {
        match error {
            RequestError::Socket(error) => error,
            RequestError::Refused(refusal) => refusal.error,
            RequestError::Answer => io::Error::new(io::ErrorKind::InvalidData, error),
        }
    }
}
