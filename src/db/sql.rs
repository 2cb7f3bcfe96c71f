//! A statement with its values, asked of whichever database a session leads to.
//!
//! Everybody on this floor writes statements with [`query`]: one text for both databases, with `$1` to `$n` for its
//! values. Postgres is asked through sqlx. SQLite is asked on the thread that runs the task: it answers from memory
//! within microseconds, which is less than it takes to hand the question to another thread. Where it will take longer,
//! whoever asks says so, and the thread's other tasks go elsewhere. Never begins or ends a transaction.

use std::borrow::Cow;
use std::fmt;

use rusqlite::types::{FromSql, ToSqlOutput, ValueRef};
use rusqlite::{Statement, ToSql};
use sqlx::postgres::{PgArguments, PgRow};
use sqlx::{AssertSqlSafe, Postgres, Row as _};
use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::task::block_in_place;
use uuid::Uuid;

use super::session::Session;
use crate::model::RunKey;

/// What a database said to a statement.
#[derive(Debug)]
pub enum SqlError {
    Postgres(sqlx::Error),
    Sqlite(rusqlite::Error),
}

impl fmt::Display for SqlError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Postgres(error) => error.fmt(f),
            Self::Sqlite(error) => error.fmt(f),
        }
    }
}

impl From<sqlx::Error> for SqlError {
    fn from(error: sqlx::Error) -> Self {
        Self::Postgres(error)
    }
}

impl From<rusqlite::Error> for SqlError {
    fn from(error: rusqlite::Error) -> Self {
        Self::Sqlite(error)
    }
}

type Result<T> = std::result::Result<T, SqlError>;

/// A longer text was made for many rows: no database keeps it prepared.
const MAX_KEPT_TEXT_BYTES: usize = 8 * 1024;
/// SQLite takes less than a millisecond for so many.
const QUICK_ROWS: usize = 500;
/// What goes through rows without knowing how many there are, for [`Query::rows`].
pub const ALL_OF_A_TABLE: usize = usize::MAX;

/// One value of a statement. `None` is NULL; Postgres wants to know of what type.
#[derive(Clone, Debug)]
pub enum Value<'q> {
    Small(Option<i32>),
    Integer(Option<i64>),
    Text(Option<Cow<'q, str>>),
    Bytes(Option<Cow<'q, [u8]>>),
    Uuid(Option<Uuid>),
}

macro_rules! values {
    ($($variant:ident from $type:ty: $make:expr;)*) => {$(
        impl<'q> From<$type> for Value<'q> {
            fn from(value: $type) -> Self {
                let make: fn($type) -> _ = $make;
                Self::$variant(Some(make(value)))
            }
        }

        impl<'q> From<Option<$type>> for Value<'q> {
            fn from(value: Option<$type>) -> Self {
                Self::$variant(value.map($make))
            }
        }
    )*};
}

values! {
    Small from i32: |value| value;
    Integer from i64: |value| value;
    Text from &'q str: Cow::Borrowed;
    Text from &'q String: |value| Cow::Borrowed(value.as_str());
    Text from String: Cow::Owned;
    Bytes from &'q [u8]: Cow::Borrowed;
    Bytes from Vec<u8>: Cow::Owned;
    Uuid from Uuid: |value| value;
}

impl<'q> From<&'q Option<String>> for Value<'q> {
    fn from(value: &'q Option<String>) -> Self {
        value.as_deref().into()
    }
}

impl ToSql for Value<'_> {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        let value = match self {
            Self::Small(value) => value.map(|value| ValueRef::Integer(value.into())),
            Self::Integer(value) => value.map(ValueRef::Integer),
            Self::Text(value) => value.as_ref().map(|value| ValueRef::Text(value.as_bytes())),
            Self::Bytes(value) => value.as_deref().map(ValueRef::Blob),
            Self::Uuid(value) => value.as_ref().map(|value| ValueRef::Blob(value.as_bytes())),
        };
        Ok(ToSqlOutput::Borrowed(value.unwrap_or(ValueRef::Null)))
    }
}

/// What a column can be read as, from either database.
pub trait Column: FromSql + sqlx::Type<Postgres> + for<'r> sqlx::Decode<'r, Postgres> {}

impl<T: FromSql + sqlx::Type<Postgres> + for<'r> sqlx::Decode<'r, Postgres>> Column for T {}

/// A row of an answer.
pub enum Row<'r> {
    Postgres(&'r PgRow),
    Sqlite(&'r rusqlite::Row<'r>),
}

impl Row<'_> {
    /// The column at a place, the first one at 0.
    pub fn get<T: Column>(&self, place: usize) -> Result<T> {
        match self {
            Self::Postgres(row) => Ok(row.try_get(place)?),
            Self::Sqlite(row) => Ok(row.get(place)?),
        }
    }

    /// The column of a name.
    pub fn named<T: Column>(&self, name: &str) -> Result<T> {
        match self {
            Self::Postgres(row) => Ok(row.try_get(name)?),
            Self::Sqlite(row) => Ok(row.get(name)?),
        }
    }
}

/// What a whole row can be read as: one value, a tuple, or a struct made by [`row_struct`].
pub trait FromRow: Sized {
    fn from_row(row: &Row<'_>) -> Result<Self>;
}

macro_rules! single_columns {
    ($($type:ty),*) => {$(
        impl FromRow for $type {
            fn from_row(row: &Row<'_>) -> Result<Self> {
                row.get(0)
            }
        }

        impl FromRow for Option<$type> {
            fn from_row(row: &Row<'_>) -> Result<Self> {
                row.get(0)
            }
        }
    )*};
}

single_columns!(i32, i64, bool, String, Vec<u8>, Uuid);

macro_rules! tuples {
    ($($column:ident $place:tt),*) => {
        impl<$($column: Column),*> FromRow for ($($column,)*) {
            fn from_row(row: &Row<'_>) -> Result<Self> {
                Ok(($(row.get::<$column>($place)?,)*))
            }
        }
    };
}

tuples!(A 0);
tuples!(A 0, B 1);
tuples!(A 0, B 1, C 2);
tuples!(A 0, B 1, C 2, D 3);
tuples!(A 0, B 1, C 2, D 3, E 4);
tuples!(A 0, B 1, C 2, D 3, E 4, F 5);
tuples!(A 0, B 1, C 2, D 3, E 4, F 5, G 6);
tuples!(A 0, B 1, C 2, D 3, E 4, F 5, G 6, H 7);
tuples!(A 0, B 1, C 2, D 3, E 4, F 5, G 6, H 7, I 8);
tuples!(A 0, B 1, C 2, D 3, E 4, F 5, G 6, H 7, I 8, J 9);

/// Declares a struct whose fields are columns, each found by its name.
macro_rules! row_struct {
    ($(#[$meta:meta])* struct $name:ident { $($field:ident: $type:ty,)* }) => {
        $(#[$meta])*
        struct $name {
            $($field: $type,)*
        }

        impl $crate::db::sql::FromRow for $name {
            fn from_row(row: &$crate::db::sql::Row<'_>) -> std::result::Result<Self, $crate::db::sql::SqlError> {
                Ok(Self {
                    $($field: row.named(stringify!($field))?,)*
                })
            }
        }
    };
}

pub(in crate::db) use row_struct;

/// A statement and its values.
#[derive(Clone, Debug)]
pub struct Query<'q> {
    text: Cow<'static, str>,
    values: Vec<Value<'q>>,
    /// About how many rows it goes through.
    rows: usize,
}

/// A statement that is written out in the program.
pub fn query<'q>(text: &'static str) -> Query<'q> {
    Query {
        text: Cow::Borrowed(text),
        values: Vec::new(),
        rows: 1,
    }
}

fn has_other_threads() -> bool {
    Handle::try_current().is_ok_and(|runtime| runtime.runtime_flavor() == RuntimeFlavor::MultiThread)
}

impl<'q> Query<'q> {
    /// Gives the next of `$1` to `$n` its value.
    pub fn bind(mut self, value: impl Into<Value<'q>>) -> Self {
        self.values.push(value.into());
        self
    }

    /// Gives the next three of them the key of a run.
    pub fn bind_run(self, run: &'q RunKey) -> Self {
        self.bind(&run.issuer).bind(&run.repository).bind(&run.run_backend_id)
    }

    /// Adds to the text.
    pub fn push(mut self, text: &str) -> Self {
        self.text.to_mut().push_str(text);
        self
    }

    /// Adds a value to the text, at its end.
    pub fn push_bind(self, value: impl Into<Value<'q>>) -> Self {
        let mut query = self.bind(value);
        let number = query.values.len().to_string();
        query.text.to_mut().push('$');
        query.text.to_mut().push_str(&number);
        query
    }

    /// Adds `VALUES` and a row of values for each of `items` to the text.
    pub fn push_values<T, const N: usize>(
        mut self,
        items: impl IntoIterator<Item = T>,
        mut values: impl FnMut(T) -> [Value<'q>; N],
    ) -> Self {
        self = self.push("VALUES ");
        for (number, item) in items.into_iter().enumerate() {
            self = self.push(if number > 0 { ", " } else { "" }).push_list(values(item));
        }
        self
    }

    /// Adds values in parentheses to the text: a row, or a list. Postgres takes no empty ones.
    pub fn push_list(mut self, values: impl IntoIterator<Item = impl Into<Value<'q>>>) -> Self {
        self = self.push("(");
        for (place, value) in values.into_iter().enumerate() {
            self = self.push(if place > 0 { ", " } else { "" }).push_bind(value);
        }
        self.push(")")
    }

    /// Says about how many rows it goes through, where they may be many.
    pub fn rows(mut self, about: usize) -> Self {
        self.rows = about;
        self
    }

    /// Runs it and says how many rows it changed.
    pub async fn execute(self, session: &mut Session) -> Result<u64> {
        match session {
            Session::Sqlite(lent) => self.prepared(lent.connection(), |statement| Ok(statement.raw_execute()? as u64)),
            session => Ok(self.for_postgres().execute(session.postgres()?).await?.rows_affected()),
        }
    }

    /// All rows.
    pub async fn fetch_all<T: FromRow>(self, session: &mut Session) -> Result<Vec<T>> {
        match session {
            Session::Sqlite(lent) => self.prepared(lent.connection(), |statement| {
                let (mut rows, mut read) = (statement.raw_query(), Vec::new());
                while let Some(row) = rows.next()? {
                    read.push(T::from_row(&Row::Sqlite(row))?);
                }
                Ok(read)
            }),
            session => {
                let rows = self.for_postgres().fetch_all(session.postgres()?).await?;
                rows.iter().map(|row| T::from_row(&Row::Postgres(row))).collect()
            }
        }
    }

    /// The first row, if there is one.
    pub async fn fetch_optional<T: FromRow>(self, session: &mut Session) -> Result<Option<T>> {
        match session {
            Session::Sqlite(lent) => self.prepared(lent.connection(), |statement| {
                let mut rows = statement.raw_query();
                rows.next()?.map(|row| T::from_row(&Row::Sqlite(row))).transpose()
            }),
            session => {
                let row = self.for_postgres().fetch_optional(session.postgres()?).await?;
                row.map(|row| T::from_row(&Row::Postgres(&row))).transpose()
            }
        }
    }

    /// The first row.
    pub async fn fetch_one<T: FromRow>(self, session: &mut Session) -> Result<T> {
        let row = self.fetch_optional(session).await?;
        row.ok_or(SqlError::Postgres(sqlx::Error::RowNotFound))
    }

    fn for_postgres(self) -> sqlx::query::Query<'q, Postgres, PgArguments> {
        let keep = self.is_kept();
        let query = match self.text {
            Cow::Borrowed(text) => sqlx::query(text),
            Cow::Owned(text) => sqlx::query(AssertSqlSafe(text)),
        };
        let query = query.persistent(keep);
        self.values.into_iter().fold(query, |query, value| match value {
            Value::Small(value) => query.bind(value),
            Value::Integer(value) => query.bind(value),
            Value::Text(value) => query.bind(value),
            Value::Bytes(value) => query.bind(value),
            Value::Uuid(value) => query.bind(value),
        })
    }

    /// Whether it stays prepared for the next time.
    fn is_kept(&self) -> bool {
        self.text.len() <= MAX_KEPT_TEXT_BYTES
    }

    fn prepared<T>(
        &self,
        connection: Result<&rusqlite::Connection>,
        ask: impl FnOnce(&mut Statement<'_>) -> Result<T>,
    ) -> Result<T> {
        let connection = connection?;
        let ask = || {
            if self.is_kept() {
                let mut statement = connection.prepare_cached(&self.text)?;
                self.bind_all(&mut statement)?;
                ask(&mut statement)
            } else {
                let mut statement = connection.prepare(&self.text)?;
                self.bind_all(&mut statement)?;
                ask(&mut statement)
            }
        };
        if self.rows > QUICK_ROWS && has_other_threads() {
            block_in_place(ask)
        } else {
            ask()
        }
    }

    /// To SQLite `$2` is a name and not a number.
    fn bind_all(&self, statement: &mut Statement<'_>) -> Result<()> {
        for place in 1..=statement.parameter_count() {
            let name = statement.parameter_name(place).unwrap_or_default();
            let number = name.strip_prefix('$').and_then(|number| number.parse::<usize>().ok());
            let value = number.and_then(|number| self.values.get(number.checked_sub(1)?));
            let value = value.ok_or_else(|| rusqlite::Error::InvalidParameterName(name.to_owned()))?;
            statement.raw_bind_parameter(place, value)?;
        }
        Ok(())
    }
}
