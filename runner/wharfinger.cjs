// Points the JavaScript actions of an unmodified runner at Wharfinger.
//
// Every Node process of the runner's jobs loads this first, since NODE_OPTIONS=--require names it in the runner's own
// environment; `wharfinger runner install` puts it there. It acts in JavaScript actions alone, where the runner has just
// set GitHub's addresses over everything else. In any other process it looks at two variables and is done: it changes
// nothing there and never says a word. Plain CommonJS for Node 16 and later.
//
//   WHARFINGER_URL         the server's origin, such as https://artifacts.example.com; nothing happens without it
//   WHARFINGER_FALLBACK    `fail` (default): no step goes elsewhere; `original`: ask the server first, and leave the
//                          step as it is when no Wharfinger answers
//   WHARFINGER_TOKEN_FILE  a runtime token for this job, in place of its own
//   WHARFINGER_ACTIONS     more actions that use artifacts or caches, such as `octo/cache,gradle/*,./.github/actions/x`
'use strict'

const fs = require('fs')
const nodePath = require('path')

/** What may be told that it runs on github.com. Further ones: WHARFINGER_ACTIONS. */
const ARTIFACT_AND_CACHE_ACTIONS = ['actions/upload-artifact', 'actions/download-artifact', 'actions/cache', 'actions/setup-*']

/** How long the server may take to answer, before a step goes elsewhere. */
const PATIENCE_MS = 5000

/**
 * The action that a process is, as a workflow's `uses:` would name it without its ref, or undefined.
 *
 * The runner starts an action as `node <its script>`, with the runtime's variables. What an action starts has inherited
 * those: so the script must be where actions are.
 */
function actionOf(env, argv, path = nodePath, exists = fs.existsSync) {
  const hasRuntime = env.ACTIONS_RUNTIME_TOKEN && (env.ACTIONS_RUNTIME_URL || env.ACTIONS_RESULTS_URL)
  if (!hasRuntime || !env.GITHUB_ACTION || argv.length !== 2) return undefined
  const script = argv[1]
  const [, owner, name] = /[\\/]_actions[\\/]([^\\/]+)[\\/]([^\\/]+)[\\/]/.exec(script) || []
  if (owner) return `${owner}/${name}`
  // act and the forges' runners that are made of it: the directory's name may be a hash.
  if (/[\\/]act[\\/]actions[\\/]/.test(script)) return env.GITHUB_ACTION_REPOSITORY || 'unknown'
  return localAction(env.GITHUB_WORKSPACE, script, path, exists)
}

/** An action of the job's own repository: in the workspace, with an action.yml beside or above its script. */
function localAction(workspace, script, path, exists) {
  if (!workspace) return undefined
  const within = path.relative(workspace, script)
  if (within.split(path.sep)[0] === '..' || path.isAbsolute(within)) return undefined
  for (let directory = path.dirname(within); ; directory = path.dirname(directory)) {
    if (['action.yml', 'action.yaml'].some(file => exists(path.join(workspace, directory, file)))) {
      return directory === '.' ? './' : `./${directory.split(path.sep).join('/')}`
    }
    if (directory === '.') return undefined
  }
}

/** Is an action one of those that use artifacts or caches? `*` stands for anything but a slash. */
function isListed(action, more = '') {
  const patterns = ARTIFACT_AND_CACHE_ACTIONS.concat(more.split(',').map(one => one.trim()).filter(Boolean))
  const matches = pattern => {
    const literals = pattern.split('*').map(text => text.replace(/[.+?^${}()|[\]\\]/g, '\\$&'))
    return new RegExp(`^${literals.join('[^/]*')}$`, 'i').test(action)
  }
  return patterns.some(matches)
}

/** WHARFINGER_URL with a slash at its end, which clients need that put paths behind it. */
function serverUrl(text) {
  let url
  try {
    url = new URL(text)
  } catch {
    // Answered below.
  }
  if (!url || !/^https?:$/.test(url.protocol) || url.href !== `${url.origin}/`) {
    // Clients drop a path. The text is not repeated: it may hold a password.
    throw new Error('WHARFINGER_URL must be an origin, such as https://artifacts.example.com')
  }
  return url.href
}

/** The variables of an action that are to change, with their new values. */
function changes(env, url, listed, token) {
  const wanted = {
    ACTIONS_RESULTS_URL: url,
    ACTIONS_CACHE_URL: url,
    ACTIONS_RUNTIME_URL: url,
    ACTIONS_CACHE_SERVICE_V2: 'True',
    ACTIONS_RUNTIME_TOKEN: token || env.ACTIONS_RUNTIME_TOKEN
  }
  // Clients refuse to work for a GitHub Enterprise Server, which they tell by this host alone.
  if (listed && isRefused(env.GITHUB_SERVER_URL)) wanted.GITHUB_SERVER_URL = 'https://github.com'
  return Object.keys(wanted).reduce(
    (changed, name) => (env[name] === wanted[name] ? changed : Object.assign(changed, { [name]: wanted[name] })),
    {}
  )
}

function isRefused(server) {
  if (!server) return false
  try {
    return !/^(github\.com|.*\.ghe\.com)$/i.test(new URL(server).hostname)
  } catch {
    return true
  }
}

function readToken(file) {
  let token
  try {
    token = fs.readFileSync(file, 'utf8').trim()
  } catch (error) {
    throw new Error(`can't read WHARFINGER_TOKEN_FILE: ${error.message}`)
  }
  if (!token) throw new Error(`WHARFINGER_TOKEN_FILE is empty: ${file}`)
  return token
}

/** Throws unless a Wharfinger answers. In a process of its own: a preload can't wait for anything else. */
function ask(env) {
  const script = `
    const url = new URL('/api/v1/version', process.env.WHARFINGER_URL)
    const fail = error => { console.error(error.message || error.code); process.exit(1) }
    const client = require(url.protocol.slice(0, -1))
    client.get(url, { timeout: ${PATIENCE_MS} }, reply => {
      let text = ''
      reply.on('data', chunk => { text += chunk }).on('error', fail).on('end', () => {
        let name
        try { ({ name } = JSON.parse(text)) } catch {}
        if (reply.statusCode !== 200 || name !== 'wharfinger') fail({ message: 'status ' + reply.statusCode + ' and no Wharfinger' })
      })
    }).on('timeout', () => fail({ message: 'no answer within ${PATIENCE_MS / 1000} s' })).on('error', fail)`
  const { status, stderr, error } = require('child_process').spawnSync(process.execPath, ['-e', script], {
    // The clients use a proxy where the environment names one.
    env: Object.assign({}, env, { NODE_USE_ENV_PROXY: '1' }),
    encoding: 'utf8',
    timeout: 2 * PATIENCE_MS
  })
  if (status !== 0) throw new Error(((stderr || '').trim() || (error && error.message) || 'no answer').split('\n')[0])
}

/**
 * What this process starts gets the runner's own values back. The environment is most often handed over as a copy, so
 * the last moment is the only one where that can be done.
 */
function restoreForChildren(changed, originals) {
  const childProcess = require('child_process')
  const restore = (name, value) => (changed[name] === value ? originals[name] : value)

  const { spawn } = childProcess.ChildProcess.prototype
  childProcess.ChildProcess.prototype.spawn = function (options) {
    if (!options || !Array.isArray(options.envPairs)) return spawn.call(this, options)
    const pairs = options.envPairs.map(pair => {
      const at = pair.indexOf('=', 1)
      const value = restore(pair.slice(0, at), pair.slice(at + 1))
      return value === undefined ? undefined : `${pair.slice(0, at)}=${value}`
    })
    return spawn.call(this, Object.assign({}, options, { envPairs: pairs.filter(pair => pair !== undefined) }))
  }

  // These don't pass there. Options come last, if at all.
  for (const name of ['spawnSync', 'execSync', 'execFileSync']) {
    const original = childProcess[name]
    childProcess[name] = function (...args) {
      while (args.length && args[args.length - 1] == null) args.pop()
      const last = args[args.length - 1]
      const options = typeof last === 'object' && !Array.isArray(last) ? args.pop() : {}
      const env = Object.assign({}, options.env || process.env)
      // One that is undefined is none.
      for (const variable of Object.keys(env)) env[variable] = restore(variable, env[variable])
      return original.call(this, ...args, Object.assign({}, options, { env }))
    }
  }
  require('module').syncBuiltinESMExports()
}

/** Synchronously, as a process may end at once. */
function say(line) {
  try {
    fs.writeSync(1, `${line}\n`)
  } catch {
    // Nobody reads along.
  }
}

function redirect(env, action) {
  const fallback = env.WHARFINGER_FALLBACK || 'fail'
  if (fallback !== 'fail' && fallback !== 'original') throw new Error('WHARFINGER_FALLBACK must be fail or original')
  const url = serverUrl(env.WHARFINGER_URL)
  const listed = isListed(action, env.WHARFINGER_ACTIONS)
  let changed
  try {
    const token = env.WHARFINGER_TOKEN_FILE && readToken(env.WHARFINGER_TOKEN_FILE)
    changed = changes(env, url, listed, token)
    // Already there: what a redirected action has started.
    if (Object.keys(changed).length === 0) return
    if (fallback === 'original') ask(env)
  } catch (error) {
    if (fallback === 'fail') throw error
    say(`Wharfinger: ${url} is not used in this step, which stays as the runner set it up: ${error.message}`)
    return
  }
  // The runner hides its own token in logs, and does not know this one.
  if (changed.ACTIONS_RUNTIME_TOKEN) say(`::add-mask::${changed.ACTIONS_RUNTIME_TOKEN}`)
  const originals = Object.keys(changed).reduce((all, name) => Object.assign(all, { [name]: env[name] }), {})
  Object.assign(env, changed)
  // tar, npm and the like are none of our business. Other actions hand caching on to what they start (docker buildx,
  // Nix, Turborepo): there the new addresses must be inherited, and nothing else was changed.
  if (listed) restoreForChildren(changed, originals)
  say(`Wharfinger: artifacts and cache of this step go to ${url.slice(0, -1)}`)
}

function main() {
  const { env, argv } = process
  if (!env.WHARFINGER_URL || !env.ACTIONS_RUNTIME_TOKEN) return
  const action = actionOf(env, argv)
  if (!action) return
  try {
    redirect(env, action)
  } catch (error) {
    say(`::error::Wharfinger: ${error.message}`)
    process.exit(1)
  }
}

main()

module.exports = { actionOf, isListed, serverUrl, changes }
