-- Takes Beacon Stop away from the first schema of search_path: psql -f sql/uninstall.sql. It can be repeated.
-- The tables stay, with all their columns and rows, and so do the records with their indexes.
--
-- Raises   invalid_schema_name (3F000)  search_path names no schema that exists
--          lock_not_available (55P03)  others use the tables for longer than lock_timeout, or a minute where that is 0
-- Locks    as the installation, all of our tables at once, if there is anything to take away
DO $$
DECLARE
    v_functions regprocedure[];
    v_drop      text;
BEGIN
    IF current_schema() IS NULL THEN
        RAISE invalid_schema_name
            USING MESSAGE = 'search_path names no schema that exists: expected the one to take Beacon Stop away from';
    END IF;
    PERFORM pg_advisory_xact_lock(hashtext('beacon-stop install'));
    PERFORM set_config('search_path', format('%I, pg_temp', current_schema()), true);
    IF to_regprocedure('installed_functions()') IS NULL THEN
        RAISE NOTICE USING
            MESSAGE = format('schema %I: nothing to take away', current_schema()),
            HINT = 'To take version 1.0 away, install this version over it first.';
        RETURN;
    END IF;
    PERFORM lock_all_tables();
    v_functions := ARRAY(SELECT f.oid
                         FROM jsonb_object_keys(installed_functions()) AS i (signature)
                         CROSS JOIN to_regprocedure(i.signature) AS f (oid)
                         WHERE f.oid IS NOT NULL) || 'installed_functions()'::regprocedure;
    -- Triggers first: they need their functions.
    FOR v_drop IN
        SELECT format('DROP TRIGGER %I ON %s', t.tgname, t.tgrelid::regclass)
        FROM pg_trigger t
        WHERE t.tgfoid = ANY (v_functions)
        UNION ALL
        SELECT 'DROP INDEX IF EXISTS executions_job_id_unfinished_idx, executions_job_id_id_idx, '
               'jobs_updated_at_ongoing_idx, jobs_updated_at_failed_idx'
        UNION ALL
        SELECT 'DROP FUNCTION ' || array_to_string(v_functions, ', ')
    LOOP
        EXECUTE v_drop;
        RAISE NOTICE USING MESSAGE = v_drop;
    END LOOP;
    RAISE NOTICE USING MESSAGE = format('schema %I: the tables, their rows and the records stay', current_schema());
END;
$$;
