//! Errors of requests.

use std::io;

/// The kernel's negative acknowledgement of one request.
#[derive(Debug, thiserror::Error)]
#[error("{}", self.sentence())]
pub struct Refusal {
    /// Error number of the acknowledgement.
    pub error: io::Error,
    /// Extended error text of the kernel, if it sent one.
    pub text: Option<String>,
}

impl Refusal {
    fn sentence(&self) -> String {
        match &self.text {
            Some(text) => format!("{text} ({})", self.error),
            None => self.error.to_string(),
        }
    }

    /// Whether the error number is one of these.
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

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// The netlink socket failed.
    #[error(transparent)]
    Socket(#[from] io::Error),
    /// The kernel refused the request.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The answer is not of the requested type.
    #[error("the kernel's answer is not understood")]
    Answer,
}

impl RequestError {
    /// Whether the kernel refused with one of these error numbers.
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
