// What the drivers of the real clients share: files that can be told from others, and running cases.
import assert from 'node:assert/strict'
import { createCipheriv, createHash, randomBytes } from 'node:crypto'
import fs from 'node:fs'
import os from 'node:os'
import path from 'node:path'
import { pipeline } from 'node:stream/promises'

export const MiB = 1024 * 1024
const CASE_TIMEOUT_MS = Number(process.env.WHARFINGER_TEST_CASE_TIMEOUT_MS || 600_000)

class NotApplicable extends Error {}
export const notApplicable = why => { throw new NotApplicable(why) }

// ---- files and hashes

export const sha256 = data => createHash('sha256').update(data).digest('hex')

/** Deterministic bytes that do not compress: a key stream. */
function* noise(seed, size) {
  const cipher = createCipheriv('aes-256-ctr', createHash('sha256').update(seed).digest(), Buffer.alloc(16))
  const zeros = Buffer.alloc(Math.min(size, MiB))
  for (let left = size; left > 0; left -= MiB) yield cipher.update(zeros.subarray(0, Math.min(left, MiB)))
}
export const noiseBuffer = (seed, size) => Buffer.concat([...noise(seed, size)])

// Blocking file access where there are many small files: several times as fast.
export function hashFile(file) {
  const hash = createHash('sha256')
  const buffer = Buffer.allocUnsafe(64 * 1024)
  const fd = fs.openSync(file)
  for (let n; (n = fs.readSync(fd, buffer)) > 0;) hash.update(buffer.subarray(0, n))
  fs.closeSync(fd)
  return hash.digest('hex')
}

/** Writes `{relative path: content or size of noise}`; returns the files and what they hash to. */
export async function makeFiles(root, contents) {
  const files = []
  const hashes = new Map()
  for (const [relative, content] of Object.entries(contents)) {
    const file = path.join(root, relative)
    fs.mkdirSync(path.dirname(file), { recursive: true })
    if (typeof content === 'number') await pipeline(noise(root + relative, content), fs.createWriteStream(file))
    else fs.writeFileSync(file, content)
    files.push(file)
    hashes.set(relative, hashFile(file))
  }
  return { root, files, hashes }
}

/** 2,000 small files in folders with names that are hard to write. */
export function manyFiles(seed) {
  const folders = [
    'plain', 'Überseehäfen', '日本語', '🚢 Schiffe', 'two  spaces', '50%', '%41', '#1', '.hidden', '..two dots',
    'a&b=c+d', "it's", 'semi;colon,comma', '[brackets]{braces}', '$HOME', '~', '`tick`', 'ยินดี', 'Привет', 'end.'
  ]
  const contents = {}
  for (let i = 0; i < 2000; i++) {
    const [a, b, c] = [folders[i % 20], folders[Math.floor(i / 20) % 20], folders[Math.floor(i / 400)]]
    const folder = [a, `${a}/${b}`, `${a}/${b}/${c}`, `${a}/${b}/${c}/.tiefer 深い`][i % 4]
    contents[`${folder}/${i % 3 ? '' : '.'}${b} ${i}${i % 5 ? '.txt' : ''}`] = `${i} ${seed}\n`.repeat(1 + (i % 50))
  }
  return contents
}

export function assertSameFiles(root, expected) {
  const actual = new Map()
  for (const entry of fs.readdirSync(root, { recursive: true, withFileTypes: true })) {
    if (entry.isDirectory()) continue
    const file = path.join(entry.parentPath, entry.name)
    actual.set(path.relative(root, file), hashFile(file))
  }
  const wrong = [
    ...[...expected].filter(([file]) => !actual.has(file)).map(([file]) => `missing: ${file}`),
    ...[...actual].filter(([file]) => !expected.has(file)).map(([file]) => `not expected: ${file}`),
    ...[...expected].filter(([file, hash]) => actual.has(file) && actual.get(file) !== hash).map(([file]) => `other content: ${file}`)
  ]
  assert(wrong.length === 0, `${wrong.length} files differ after the download: ${wrong.slice(0, 5).join('; ')}`)
}

export const temporaryDirectory = () => fs.mkdtempSync(path.join(process.env.RUNNER_TEMP || os.tmpdir(), 'wharfinger-e2e-'))

// ---- running

/** Runs one case after the other and reports each. `find` gives the test of a name. */
export async function runCases(client, names, find) {
  for (const name of names) {
    const result = await run(client, name, find(name))
    process.stdout.write(`@@${JSON.stringify({ client, case: name, ...result })}\n`)
  }
}

async function run(client, name, test) {
  const directory = temporaryDirectory()
  let timer
  const timeout = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error(`no end after ${CASE_TIMEOUT_MS} ms`)), CASE_TIMEOUT_MS)
  })
  const unique = `${client} ${name} ${randomBytes(4).toString('hex')}`
  const started = Date.now()
  try {
    const detail = await Promise.race([test(directory, unique), timeout])
    return { status: 'ok', detail, ms: Date.now() - started }
  } catch (error) {
    const status = error instanceof NotApplicable ? 'na' : 'fail'
    const where = status === 'fail' ? error.stack?.match(/(client|cache|files)\.mjs:\d+/)?.[0] : undefined
    if (status === 'fail') console.error(error)
    return { status, detail: where ? `${error.message} (${where})` : error.message, ms: Date.now() - started }
  } finally {
    clearTimeout(timer)
    // After a timeout the client may still be writing there.
    fs.rmSync(directory, { recursive: true, force: true, maxRetries: 5 })
  }
}
