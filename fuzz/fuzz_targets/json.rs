//! JSON with something else in places.

use arbitrary::Arbitrary;
use serde_json::Value;

/// What stands there instead.
#[derive(Arbitrary, Debug)]
pub enum Change {
    Number(u64),
    Small(u8),
    Negative(i64),
    Text(String),
    List(Vec<u8>),
    Twice,
    True,
    Null,
}

/// Makes each change at the value that is reached after so many others.
pub fn change(value: &mut Value, changes: &[(u16, Change)]) {
    for (at, change) in changes {
        let mut left = *at;
        alter(value, &mut left, change);
    }
}

/// Changes the value that is reached after so many others. False once it is done.
fn alter(value: &mut Value, left: &mut u16, change: &Change) -> bool {
    let inner: Vec<&mut Value> = match value {
        Value::Array(items) => items.iter_mut().collect(),
        Value::Object(members) => members.values_mut().collect(),
        _ => Vec::new(),
    };
    if !inner.into_iter().all(|inner| alter(inner, left, change)) {
        return false;
    }
    if *left > 0 {
        *left -= 1;
        return true;
    }
    *value = match change {
        Change::Number(number) => (*number).into(),
        Change::Small(number) => (*number).into(),
        Change::Negative(number) => (*number).into(),
        Change::Text(text) => text.as_str().into(),
        Change::List(numbers) => numbers.iter().copied().collect(),
        Change::Twice => vec![value.clone(); 2].into(),
        Change::True => true.into(),
        Change::Null => Value::Null,
    };
    false
}
